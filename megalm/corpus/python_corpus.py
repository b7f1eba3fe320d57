"""The text that every machine with Python has: its own sources and documentation, and those of the installed packages.

Prose comes first (.rst, .md, .txt, package descriptions), then the standard library without its tests, then the
packages' sources in the order of a hash of their paths, until the size is reached; about an eighth of the default 40
MB is prose, the rest code with its docstrings. Files with the same content are taken once; tests, generated tables
and tiny files are left out. The chosen documents are shuffled by the hash of their relative paths.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator

from megalm.corpus.documents import Piece

NAME = "python-corpus"
DEFAULT_MEGABYTES = 40.0
PROSE_ENDINGS = (".rst", ".md", ".txt")
LEFT_OUT_FOLDERS = {
    "__pycache__",
    "test",
    "tests",
    "testing",
    "idle_test",
    "_vendor",
    "vendor",
    "node_modules",
    "licenses",
}
LEFT_OUT_FILES = {"top_level.txt", "entry_points.txt", "SOURCES.txt", "requires.txt", "dependency_links.txt"}
LEGAL = ("LICENSE", "LICENCE", "COPYING", "NOTICE")  # the same few texts again and again
SMALLEST, LARGEST = 400, 400_000  # bytes: below there is no sentence, above there are tables


def choose_python_files(megabytes: float = DEFAULT_MEGABYTES) -> list[Piece]:
    """Choose the chosen files as pieces, in their shuffled order; the same for the same installation."""
    paths = sysconfig.get_paths()
    library, packages = paths["stdlib"], paths["purelib"]
    prose: list[tuple[str, str]] = []
    code: list[tuple[str, str]] = []
    package_code: list[tuple[str, str]] = []
    for root, label, sources in ((library, "python", code), (packages, "packages", package_code)):
        for path in _walk(root):
            name = f"{label}/{os.path.relpath(path, root).replace(os.sep, '/')}"
            if name.endswith(PROSE_ENDINGS) or name.endswith("/METADATA"):
                prose.append((name, path))
            elif name.endswith(".py"):
                sources.append((name, path))
    limit, taken = int(megabytes * 1e6), 0
    chosen: list[tuple[bytes, Piece]] = []
    contents: set[bytes] = set()
    for files in (prose, code, package_code):
        for key, name, path in sorted((_hash(name.encode()), name, path) for name, path in files):
            if taken >= limit:
                break
            content = _content(path)
            if content is None or (digest := _hash(content)) in contents:
                continue
            contents.add(digest)
            taken += len(content)
            chosen.append((key, Piece(path, len(content), name=name, source=_kind(name))))
    return [piece for _, piece in sorted(chosen, key=lambda item: (item[0], item[1].name))]


def _walk(root: str) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            f for f in folders if f not in LEFT_OUT_FOLDERS and f not in ("site-packages", "dist-packages")
        )
        for name in sorted(names):
            if name.endswith((".py", *PROSE_ENDINGS)) or name == "METADATA":
                if (
                    name in LEFT_OUT_FILES
                    or name.startswith("test_")
                    or name.endswith("_test.py")
                    or name.upper().startswith(LEGAL)
                ):
                    continue
                yield os.path.join(folder, name)


def _kind(name: str) -> str:
    return f"{name.split('/')[0]} {'code' if name.endswith('.py') else 'prose'}"


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _content(path: str) -> bytes | None:
    try:
        size = os.path.getsize(path)
        if not SMALLEST <= size <= LARGEST:
            return None
        with open(path, "rb") as file:
            content = file.read()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return content
