"""Repeated spans of tokens of a token file: every span of `length` tokens or more that occurred before, in any document,
is cut out. How they are found: megalm/corpus/dedup/spans.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.files import save, write_whole
from megalm.corpus.dedup.spans import Symbols, find_spans
from megalm.corpus.dedup.stages import Progress, Stages
from megalm.corpus.engine import Engine
from megalm.data.tokens import TokenFile, TokenWriter


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of the file, all of document `document`; their first window occurred before at `first`."""

    document: int
    start: int
    stop: int
    first: int


def _document_starts(file: TokenFile) -> np.ndarray:
    starts = np.append(np.asarray(file.pointers) // file.dtype.itemsize, file.num_tokens)
    return starts[np.asarray(file.documents)]


def find_repeated_token_spans(
    file: TokenFile,
    length: int = 50,
    engine: Engine | None = None,
    folder: str | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> list[Span]:
    """Find all spans to cut, in the file's order, touching and overlapping ones joined.

    `folder` is for what waits on disk; it is removed, unless an interruption leaves it for the same call to go on from.
    `chunk`: tokens sorted at a time, by default 16 million.
    Errors: ConfigError if the length is below 2.
    """
    if length < 2:
        raise ConfigError(f"--length is {length}: a span has at least 2 tokens.")
    path = os.path.abspath(f"{file.prefix}.bin")
    changed = os.stat(path).st_mtime_ns
    recipe = {"format": 1, "path": path, "changed": changed, "length": length, "chunk": chunk} if folder else None
    stages = Stages(folder or tempfile.mkdtemp(prefix="dedup-"), engine, recipe, progress)
    failed = True
    try:
        starts = os.path.join(stages.folder, "starts")
        save(starts, _document_starts(file).astype("<i8"))
        spans = find_spans(Symbols(path, file.dtype.str, starts, changed), length, stages, chunk)
        failed = False
        return [Span(*span) for span in spans.tolist()]
    finally:
        stages.close(keep=failed and recipe is not None)


def cut_spans(file: TokenFile, spans: list[Span], output: str, removed: str | None = None) -> dict[str, Any]:
    """Writes the file without the spans (a document that is all gone is left out), and the list of what was cut."""
    starts = _document_starts(file)
    by_document: dict[int, list[Span]] = {}
    for span in spans:
        by_document.setdefault(span.document, []).append(span)
    kept = gone = 0
    with TokenWriter(output, file.dtype.newbyteorder("=")) as writer:
        for document in range(file.num_documents):
            at, pieces = int(starts[document]), []
            for span in by_document.get(document, []):
                pieces.append(file.tokens[at : span.start])
                at = span.stop
            pieces.append(file.tokens[at : int(starts[document + 1])])
            tokens = np.concatenate(pieces)
            if len(tokens):
                writer.add_document(tokens)
                kept += 1
            else:
                gone += 1
        if writer.num_documents == 0:
            raise ConfigError(f"{file.prefix}: nothing is left without its repeated spans. Pass a larger --length.")
    if removed:
        with write_whole(removed) as out:
            for span in spans:
                row = {"document": span.document, "token": span.start, "tokens": span.stop - span.start}
                origin = file.document_at(span.first)
                row["duplicate_of"] = {"document": origin, "token": span.first}  # type: ignore[assignment]
                out.write(json.dumps(row).encode() + b"\n")
    cut = sum(span.stop - span.start for span in spans)
    return {
        "documents": file.num_documents,
        "documents_gone": gone,
        "tokens": file.num_tokens,
        "spans": len(spans),
        "tokens_cut": cut,
    }
