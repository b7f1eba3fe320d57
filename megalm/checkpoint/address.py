"""What a place of checkpoints is called: a folder, or the URL of an object store."""

import re
from pathlib import Path


def read_url(path: Path | str) -> str | None:
    """`path` if it is a URL (also one that went through `Path`, which makes `s3://b` into `s3:/b`); None for a folder."""
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(path))
    if match is None:
        return None
    root = "/" if match[1] in ("file", "local") else ""  # their first part is a folder, not a host or a bucket
    return f"{match[1]}://{root}{match[2]}"
