"""What is in a token file: the facts behind `tools/inspect data`."""

from __future__ import annotations

import contextlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.order import derive_key, permute
from megalm.data.tokens import TokenFile
from megalm.tokenizer.tokenizer import Tokenizer, load_tokenizer

COUNTED_TOKENS = (
    4_000_000  # of a larger file, repeated spans are counted in evenly spaced stretches of this size together
)
STRETCHES = 64


def find_tokenizer(prefix: str | os.PathLike) -> Tokenizer | None:
    """Find the tokenizer that `tools/tokenize` left beside the data, or named in its recipe."""
    candidates = [Path(f"{_stem(prefix)}_tokenizer.json")]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        candidates.append(Path(_recipe(prefix)["outcome"]["tokenizer"]))
    return next((load_tokenizer(path) for path in candidates if path.is_file()), None)


def list_document_inputs(prefix: str | os.PathLike, documents: int) -> list[tuple[int, str]]:
    """(number of its first document, name) of each input that `tools/tokenize` was given, in the order of the file; empty
    where its recipe is not there, or is of other documents.
    """
    try:
        content = _recipe(prefix)
        counts: dict[str, int] = {}
        for key, tally in content["outcome"]["tallies"].items():
            source = key.split("\t")[0]
            counts[source] = counts.get(source, 0) + int(tally["documents"])
        names = ["standard input" if name == "-" else name for name in content["recipe"]["inputs"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    if sum(counts.values()) != documents or not set(counts) <= set(names):
        return []
    found, first = [], 0
    for name in dict.fromkeys(names):
        if counts.get(name):
            found.append((first, name))
            first += counts[name]
    return found


def _stem(prefix: str | os.PathLike) -> str:
    return os.fspath(prefix).rstrip("/").removesuffix("_text_document").removesuffix("_mds")


def _recipe(prefix: str | os.PathLike) -> dict[str, Any]:
    return json.loads(Path(f"{_stem(prefix)}_recipe.json").read_text(encoding="utf-8"))


def measure_documents(file: TokenFile) -> np.ndarray:
    """Measure tokens of each document. Shapes: -> int64 [documents]"""
    ends = np.append(np.asarray(file.pointers), file.num_tokens * file.dtype.itemsize)
    return np.diff(ends[np.asarray(file.documents)]) // file.dtype.itemsize


def count_lengths(lengths: np.ndarray) -> list[dict[str, int]]:
    """Count documents and tokens by length, in powers of two: `from` <= length < `to`."""
    bins = np.where(lengths > 0, np.floor(np.log2(np.maximum(lengths, 1))), -1).astype(int)
    rows = []
    for value in range(bins.min(), bins.max() + 1):
        inside = bins == value
        low = 0 if value < 0 else 1 << value
        rows.append(
            {"from": low, "to": 1 << (value + 1), "documents": int(inside.sum()), "tokens": int(lengths[inside].sum())}
        )
    return rows


def summarize(file: TokenFile) -> dict[str, Any]:
    """Counts, sizes and the histogram."""
    lengths = measure_documents(file)
    return {
        "prefix": str(file.prefix),
        "documents": file.num_documents,
        "sequences": file.num_sequences,
        "tokens": file.num_tokens,
        "bytes": file.num_tokens * file.dtype.itemsize,
        "token_type": str(file.dtype),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "histogram": count_lengths(lengths),
    }


def sample_documents(
    file: TokenFile, count: int, seed: int, tokens: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """Documents chosen by the seed, with the input they came from where that is known, their place, and the beginning of
    their text (or of their ids)."""
    inputs = list_document_inputs(file.prefix, file.num_documents)
    chosen = permute(np.arange(min(count, file.num_documents)), file.num_documents, derive_key("look", seed))
    rows = []
    for document in map(int, chosen):
        ids = file.document(document)
        start = file.document_start(document)
        shown = ids[:tokens]
        row: dict[str, Any] = {"document": document, "token": start, "byte": start * file.dtype.itemsize}
        row["tokens"] = len(ids)
        if inputs:
            row["source"] = inputs[bisect_right(inputs, (document, chr(0x10FFFF))) - 1][1]
        rows.append({**row, "text": tokenizer.decode(shown) if tokenizer else " ".join(map(str, shown))})
    return rows


def find_repeated_spans(file: TokenFile, length: int, count: int) -> list[dict[str, Any]]:
    """Find the spans of `length` tokens that occur most often, each extended for as long as all that follows repeats as often.

    Counted by a 64-bit polynomial hash of every window; of a large file only in evenly spaced stretches.
    """
    stretch = COUNTED_TOKENS // STRETCHES
    if file.num_tokens <= COUNTED_TOKENS:
        parts = [(0, file.num_tokens)]
    else:
        starts = np.linspace(0, file.num_tokens - stretch, STRETCHES).astype(np.int64)
        parts = [(int(start), int(start) + stretch) for start in starts]
    rows = find_repeats([(start, file.read(start, stop)) for start, stop in parts], length, count)
    return [{name: row[name] for name in ("times", "token", "tokens")} for row in rows]


def find_repeats(parts: Sequence[tuple[int, np.ndarray]], length: int, count: int) -> list[dict[str, Any]]:
    """Find the same over parts of a stream, each with the place where it begins; `places`: where the first hundred windows of a
    span begin."""
    hashes, places = [], []
    for start, tokens in parts:
        if len(tokens) >= length:
            hashes.append(hash_windows(tokens, length))
            places.append(np.arange(start, start + len(tokens) - length + 1))
    if not hashes:
        return []
    place = np.concatenate(places)
    _, first, inverse, times = np.unique(
        np.concatenate(hashes), return_index=True, return_inverse=True, return_counts=True
    )
    repeats = times[inverse]  # of the window at each place
    rows: list[dict[str, Any]] = []
    taken: list[tuple[int, int]] = []
    for candidate in np.argsort(-times, kind="stable"):
        if times[candidate] < 2 or len(rows) == count:
            break
        at = int(first[candidate])
        if any(low - length < at < high for low, high in taken):
            continue
        end = at
        while at > 0 and repeats[at - 1] == times[candidate] and place[at - 1] == place[at] - 1:
            at -= 1
        while end + 1 < len(repeats) and repeats[end + 1] == times[candidate] and place[end + 1] == place[end] + 1:
            end += 1
        taken.append((at, end + length))
        row: dict[str, Any] = {
            "times": int(times[candidate]),
            "token": int(place[at]),
            "tokens": int(end - at) + length,
        }
        rows.append({**row, "places": place[np.flatnonzero(inverse == candidate)[:100]].tolist()})
    return rows


def hash_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """A hash of every window of `length` tokens, by doubling: windows of 2k from two windows of k.

    Shapes: tokens [N] -> uint64 [N - length + 1]
    """
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    power = (tokens.astype(np.uint64) + np.uint64(1)) * multiplier
    power ^= power >> np.uint64(29)
    width, factor = 1, multiplier
    result, done = None, 0
    with np.errstate(over="ignore"):
        while True:
            if length & width:
                part = power[done : done + len(tokens) - length + 1]
                result = part.copy() if result is None else result * factor + part
                done += width
            if width * 2 > length:
                break
            power = power[: len(power) - width] * factor + power[width:]
            factor, width = factor * factor, width * 2
    assert result is not None
    return result
