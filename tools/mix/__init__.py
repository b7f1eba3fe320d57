"""Mix data sources: tokens, proportions and epochs."""
