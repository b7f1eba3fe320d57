"""Data work beside other data tools."""
