"""Checkpoints: saved on any layout, loaded on any other, committed by one rename, every byte under a checksum."""

from megalm.checkpoint.checkpointer import Checkpointer
from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError
from megalm.checkpoint.random_state import restore_random_state, take_random_state
from megalm.checkpoint.reader import CheckpointReader

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Checkpointer",
    "CorruptCheckpointError",
    "take_random_state",
    "restore_random_state",
]
