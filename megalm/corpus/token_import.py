"""Token files of other programs as a .bin/.idx pair: the same tokens, cut into documents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.merge import cut_into_parts
from megalm.data.formats.foreign_tokens import MOST, ForeignTokens, is_there, open_foreign
from megalm.data.tokens import TokenWriter

LOOKED_AT = 1 << 22  # tokens at a time


@dataclass(frozen=True)
class Imported:
    """What was written."""

    prefix: str
    formats: tuple[str, ...]
    documents: int
    tokens: int


def import_tokens(
    paths: Sequence[str], output: str, token_type: str | None = None, end_id: int | None = None
) -> Imported:
    """Writes OUTPUT_text_document.bin and .idx.

    end_id: the token that ends documents, or, where a file begins with it, begins them; without it each file, or row of a
    file, is a document, unless the file says where its documents end.
    Errors: ConfigError for a file that is not there, is of no known format, or holds what is no token.
    """
    for path in paths:
        if not is_there(path):
            raise ConfigError(f"input {path!r} names no file: with --from-tokens give the token files themselves.")
    files = [open_foreign(path, token_type) for path in paths]
    small = all(np.dtype(file.tokens.dtype).name in ("uint8", "uint16") for file in files)
    prefix = f"{output}_text_document"
    if any(os.path.realpath(path) == os.path.realpath(f"{prefix}.bin") for path in paths):
        raise ConfigError(f"--output {output}: {prefix}.bin is an input: choose another name.")
    with TokenWriter(prefix, np.uint16 if small else np.int32) as writer:
        for path, file in zip(paths, files, strict=True):
            lengths = np.diff(_ends_of(path, file, end_id), prepend=0)
            lengths, at = lengths[lengths > 0], 0
            for start, stop in cut_into_parts(lengths):
                part = lengths[start:stop]
                writer.add_documents(file.tokens[at : at + int(part.sum())], part)
                at += int(part.sum())
    formats = tuple(dict.fromkeys(file.format for file in files))
    return Imported(prefix, formats, writer.num_documents, writer.num_tokens)


def _ends_of(path: str, file: ForeignTokens, end_id: int | None) -> np.ndarray:
    """Where each document ends, the last one with the file. Shapes: -> int64 [documents]"""
    count = len(file.tokens)
    if count == 0:
        raise ConfigError(f"{path}: holds no token. Leave it out.")
    marks = [np.empty(0, np.int64)]
    for at in range(0, count, LOOKED_AT):
        tokens = _checked(path, file.tokens[at : at + LOOKED_AT], at)
        if end_id is not None:
            marks.append(np.flatnonzero(tokens == end_id) + at)
    if end_id is None:
        return np.array([count]) if file.ends is None else file.ends
    found = np.concatenate(marks)
    if len(found) == 0:
        raise ConfigError(
            f"{path}: the token {end_id} is nowhere in its {count} tokens: give the one that ends documents."
        )
    if found[0] == 0:
        return np.append(found[1:], count)
    return np.unique(np.append(found + 1, count))


def _checked(path: str, tokens: Any, at: int) -> np.ndarray:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > MOST:
        raise ConfigError(
            f"{path}: holds {low if low < 0 else high} near token {at}, which is no token: is its type right?"
        )
    return tokens
