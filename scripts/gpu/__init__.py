"""The stages of scripts/gpu_check.sh: what is run on a machine with a GPU, in two calls that each fit a few minutes."""
