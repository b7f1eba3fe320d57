"""A digest of what Python and the compiled extension must agree on: each op's contract (op.h) and binding (bind.cpp).

The build compiles it into megalm._C; megalm.ops compares it with the sources beside it, where there are any.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SOURCE = Path(__file__).resolve().parent


def digest(source: Path = SOURCE) -> str:
    """16 hex digits; comments and white space do not count."""
    paths = [source / "common" / "op.h", source / "common" / "bind.h"]
    for folder in sorted(path.parent for path in source.glob("*/bind.cpp")):
        paths += [path for path in (folder / "op.h", folder / "bind.cpp") if path.exists()]
    total = hashlib.blake2b(digest_size=8)
    for path in paths:
        text = re.sub(r"//[^\n]*|\s+", "", path.read_text(encoding="utf-8"))
        total.update(f"{path.relative_to(source).as_posix()}\n{text}\n".encode())
    return total.hexdigest()
