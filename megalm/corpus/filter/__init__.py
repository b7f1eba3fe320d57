"""Filters for documents: scores, rules over them, edits of texts; what is kept, what goes, and why."""
