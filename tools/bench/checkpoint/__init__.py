"""Saving, resuming, converting, and what a crash leaves."""
