"""Runs that are damaged on purpose: what is found, how soon, and what it costs."""
