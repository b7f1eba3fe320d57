"""Measure megalm beside its peers, alternating in one run."""
