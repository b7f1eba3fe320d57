"""Conversion from and to other libraries' checkpoints: a table of rules for each, read in either direction."""
