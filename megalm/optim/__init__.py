"""Optimizers over flat, sharded buffers; gradient clipping; learning-rate schedules."""
