"""Keeping a run alive: starting its ranks, and starting them again."""
