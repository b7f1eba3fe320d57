"""megalm: train large language models, from a laptop to thousands of GPUs, with one command."""

__version__ = "0.1.0"
