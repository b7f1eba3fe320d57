"""Damage on purpose, to see the run recover."""
