"""Turn text into a token file."""
