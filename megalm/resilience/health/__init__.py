"""Whether a machine and its devices are fit to train."""
