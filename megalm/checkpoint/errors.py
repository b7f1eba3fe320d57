"""What can go wrong with a checkpoint that is no mistake of the person's."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what is on the disk is not what was written."""


class CorruptCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, cut short, or holds other bytes than were saved."""
