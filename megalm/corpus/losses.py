"""What of a text does not come back from its tokens, and how the tool finds out without slowing down.

Ids of the unknown token, and control tokens inside a text, are counted exactly, in the ids. Characters that vanish leave
no id: of a vocabulary that can drop them (a BPE without an unknown token that does not know every byte) each text is
looked at; all others cannot. Whether texts come back in the same letters, which normalizers may change, is tried on a
sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from megalm.tokenizer.tokenizer import CannotEncode, Tokenizer

NEAR = 64  # ids that lie closer are looked for as one range
RANGES = 4  # more of them are looked up in a table, which takes longer
SAMPLED_TEXTS, SAMPLED_CHARACTERS = 24, 2000  # of the texts that the fast library was proven on


@dataclass
class Losses:
    """Tokens and characters of texts that do not stand for what was there, and how many documents have any."""

    unknown: int = 0
    """Ids of the unknown token."""
    unknown_documents: int = 0
    dropped: int = 0
    """Characters that no id stands for."""
    dropped_documents: int = 0
    control: int = 0
    """Control tokens that a text gave by itself, among them the end of documents."""
    control_documents: int = 0

    def add(self, other: Losses) -> None:
        """Adds another one to this."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))


@dataclass(frozen=True)
class RoundTrips:
    """How many of a sample of texts came back from their tokens."""

    tried: int = 0
    changed: int = 0
    example: tuple[str, str] = ("", "")
    """Where the first one that did not differs: what was there, and what came back."""


@dataclass(frozen=True)
class Counts:
    """For each of some documents: ids of the unknown token, characters dropped, control tokens. Shapes: int64 [documents]"""

    unknown: np.ndarray
    dropped: np.ndarray
    control: np.ndarray

    def total(self) -> Losses:
        """All documents together."""
        parts = (self.unknown, self.dropped, self.control)
        return Losses(*(int(n) for part in parts for n in (part.sum(), np.count_nonzero(part))))


class Watch:
    """Counts what documents lose, by their ids and, where characters can vanish, by their texts."""

    def __init__(self, tokenizer: Tokenizer, *, control_wanted: bool, has_begin: bool, has_end: bool):
        self._tokenizer, self._begin, self._end = tokenizer, has_begin, has_end
        self._drops = tokenizer.drops_characters
        self._unknown = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
        control = set() if control_wanted else {*tokenizer.control_ids()} - {self._unknown}
        self._control = np.array(sorted(control), np.int64)
        looked_for = sorted({*control, self._unknown} - {-1})
        self._ranges: list[tuple[int, int]] = []
        for number in looked_for:
            if self._ranges and number - self._ranges[-1][1] <= NEAR:
                self._ranges[-1] = self._ranges[-1][0], number
            else:
                self._ranges.append((number, number))
        self._table = np.zeros(tokenizer.vocab_size, bool)
        self._table[looked_for] = True

    def count(self, texts: Sequence[str], stream: np.ndarray, lengths: np.ndarray) -> Counts:
        """Shapes: stream uint32 [N], the documents one after another with begin and end; lengths [documents]"""
        ends = np.cumsum(lengths) - 1
        places = self._places(stream)
        owner = np.searchsorted(ends, places)
        if self._end:
            inside = ends[owner] != places
            places, owner = places[inside], owner[inside]
        if self._begin:
            inside = ends[owner] - lengths[owner] + 1 != places
            places, owner = places[inside], owner[inside]
        ids, documents = stream[places], len(lengths)
        dropped = np.zeros(documents, np.int64)
        if self._drops:
            dropped[:] = [self._tokenizer.count_dropped(text) for text in texts]
        return Counts(
            np.bincount(owner[ids == self._unknown], minlength=documents)
            if self._unknown >= 0
            else np.zeros_like(dropped),
            dropped,
            np.bincount(owner[np.isin(ids, self._control)], minlength=documents),
        )

    def _places(self, stream: np.ndarray) -> np.ndarray:
        """Where ids stand that are looked for, or that lie between two such. Shapes: -> int64 [found], rising"""
        if len(self._ranges) > RANGES:
            return np.flatnonzero(self._table[stream])
        found = [
            np.flatnonzero(
                stream == np.uint32(low) if low == high else stream - np.uint32(low) <= np.uint32(high - low)
            )
            for low, high in self._ranges
        ]
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def try_round_trips(tokenizer: Tokenizer, texts: Iterable[str]) -> RoundTrips:
    """Encodes some of these texts and decodes them again. A space that the tokenizer puts before a text is no change."""
    tried = changed = 0
    example = ("", "")
    for text in texts:
        text = text[:SAMPLED_CHARACTERS]
        if tried >= SAMPLED_TEXTS or not text:
            continue
        try:
            ids = tokenizer.encode(text).tolist()
        except CannotEncode:
            continue
        tried += 1
        unknown = tokenizer.unknown_id in ids
        back = "" if unknown else tokenizer.decode_text(ids)
        if back not in (text, f" {text}"):
            changed += 1
            if not unknown and example == ("", ""):
                example = _difference(text, back)
    return RoundTrips(tried, changed, example)


def _difference(text: str, back: str) -> tuple[str, str]:
    """Both from a little before the first letter in which they differ."""
    same = next((at for at, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start = max(same - 15, 0)
    return text[start : same + 15], back[start : same + 15]


def describe_losses(losses: Losses, trips: RoundTrips, documents: int) -> list[str]:
    """Sentences for people, none where nothing was lost."""
    lines = []
    if losses.unknown:
        lines.append(
            f"warning: {losses.unknown} unknown tokens in {losses.unknown_documents} of {documents} documents stand for "
            "characters or words that the vocabulary lacks; what was there cannot be read back"
        )
    if losses.dropped:
        lines.append(
            f"warning: {losses.dropped} characters of {losses.dropped_documents} of {documents} documents vanished: the "
            "vocabulary lacks them and has no unknown token"
        )
    if losses.control:
        lines.append(
            f"warning: {losses.control} tokens that begin, end or control documents stand inside "
            f"{losses.control_documents} of {documents} documents, because the vocabulary uses them for text, too; choose "
            "another end by --eos if it is that one"
        )
    if trips.changed:
        was, became = trips.example
        shown = f", such as {was!r}, which comes back as {became!r}" if (was, became) != ("", "") else ""
        lines.append(
            f"{trips.changed} of {trips.tried} sampled texts do not come back from their tokens letter by letter{shown}"
        )
    return lines
