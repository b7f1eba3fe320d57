"""Seeing what data holds: a sample, what is measured of it, labels, and a page for it."""
