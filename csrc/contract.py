"""A digest of what Python and the compiled extension must agree on: each op's contract (op.h) and how it is bound.

The build compiles it into megalm._C; megalm.ops compares it with the sources beside it, where there are any.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SOURCE = Path(__file__).resolve().parent


def digest(source: Path = SOURCE) -> str:
    """16 hex digits; comments and white space do not count."""
    paths = [source / "bindings.cpp", source / "common" / "bind.h", *sorted(source.glob("*/op.h"))]
    total = hashlib.blake2b(digest_size=8)
    for path in paths:
        text = re.sub(r"//[^\n]*|\s+", "", path.read_text(encoding="utf-8"))
        total.update(f"{path.relative_to(source).as_posix()}\n{text}\n".encode())
    return total.hexdigest()
