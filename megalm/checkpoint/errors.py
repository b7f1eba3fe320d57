"""What can go wrong with a checkpoint that is no mistake of the person's."""

import errno


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what is on the disk is not what was written."""


class CorruptCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, cut short, or holds other bytes than were saved."""


class NoSpaceError(CheckpointError):
    """The disk is full, or a limit on space is reached."""


def wants_space(error: BaseException) -> bool:
    """Whether room on the disk, or in a quota, would help."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
