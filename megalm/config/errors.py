"""The one exception that means "the person's input is wrong": printed as a message, exit status 2, no traceback."""

import errno


class ConfigError(Exception):
    """Configuration or input that cannot be used.

    The message says what was wrong with its value, what is allowed, and what to do next.
    """


def explain_full_disk(error: OSError) -> ConfigError | None:
    """The error in words, if it says that a file could not be written for want of space; None for any other."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    place = f" at {error.filename}" if error.filename else ""
    return ConfigError(
        f"the disk is full, or a limit on space is reached{place} ({error.strerror}). Make room, or write somewhere else; "
        "the same command then goes on from what is done."
    )
