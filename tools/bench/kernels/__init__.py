"""Kernels beside eager PyTorch and the libraries people use."""
