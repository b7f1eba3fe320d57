"""Every layout beside one process."""
