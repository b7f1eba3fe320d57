"""The training step beside other trainers."""
