"""The compiled extension for the data code, which works without it and without torch."""

from functools import cache
from types import ModuleType


@cache
def load_library() -> ModuleType | None:
    """`megalm._C`, or None where it was not built, or built before the functions that are called here were added."""
    try:
        import torch  # noqa: F401  before the extension, which then shares torch's OpenMP runtime

        from megalm import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _C if hasattr(_C, "dealt") and hasattr(_C, "starts") else None
