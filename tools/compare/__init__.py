"""Compare runs: a table in the terminal, their curves on one page."""
