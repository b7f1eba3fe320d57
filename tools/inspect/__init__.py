"""Look into data sets, batches, checkpoints and kernels."""
