"""Many texts, held as their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from megalm.corpus.suffix import load_native

CODES = 0x20000  # no letter beyond has a small one
SPECIAL = 0xFFFFFFFF  # as in csrc/shingle/op.h


@dataclass(frozen=True)
class Texts:
    """Texts one after another, in UTF-8.

    Shapes: data uint8 [bytes]; ends int64 [texts], where each ends; ascii bool [texts], whether it is all ASCII
    """

    data: np.ndarray
    ends: np.ndarray
    ascii: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Halves of surrogate pairs, which are no text, become question marks."""
        listed = list(texts)
        parts = [text.encode("utf-8", "replace") for text in listed]
        return cls(
            np.frombuffer(b"".join(parts), np.uint8),
            np.cumsum([len(part) for part in parts], dtype=np.int64),
            np.array([text.isascii() for text in listed], bool),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def contents(self) -> Iterator[memoryview]:
        """The bytes of each text."""
        view, start = np.ascontiguousarray(self.data).data, 0
        for end in self.ends.tolist():
            yield view[start:end]
            start = end

    def at(self, number: int) -> str:
        """One of the texts."""
        start = int(self.ends[number - 1]) if number else 0
        return str(self.data[start : int(self.ends[number])].data, "utf-8")

    def __iter__(self) -> Iterator[str]:
        return (str(content, "utf-8") for content in self.contents())

    def count_characters(self) -> np.ndarray:
        """Count characters of each text.

        Shapes: -> int64 [texts]
        """
        if self.ascii.all():
            return np.diff(self.ends, prepend=0)
        begun = np.concatenate(([0], np.cumsum((self.data & 0xC0) != 0x80)))
        return np.diff(begun[self.ends], prepend=0)

    def in_lower_case(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes, with every letter beyond ASCII small, as Python's `lower` makes it, and where each text ends. Capitals
        of ASCII may stay as they are."""
        if self.ascii.all():
            return self.data, self.ends
        library = load_native()
        if library is None:
            return self._lowered(self.data, self.ends, ~self.ascii)
        texts, small = len(self), _small_letters()
        out, ends = np.empty(len(self.data) * 3 // 2, np.uint8), np.empty(texts, np.int64)
        special = np.empty(texts, np.uint8)
        inputs = [np.ascontiguousarray(array) for array in (self.data, self.ends, self.ascii)]
        addresses = [array.ctypes.data for array in (*inputs, small, out, ends, special)]
        library.lower_case(*addresses[:3], texts, addresses[3], len(small), *addresses[4:])
        out = out[: ends[-1]]
        return self._lowered(out, ends, special > 0) if special.any() else (out, ends)

    def _lowered(self, data: np.ndarray, ends: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of these texts, of which some are there, and of the wanted ones nothing, or what they are to replace."""
        lengths = np.diff(ends, prepend=0)
        parts, at = [], 0
        for text in np.flatnonzero(wanted).tolist():
            start = int(self.ends[text - 1]) if text else 0
            content = str(self.data[start : self.ends[text]].data, "utf-8").lower().encode("utf-8")
            end = int(ends[text])
            parts += [data[at : end - int(lengths[text])], np.frombuffer(content, np.uint8)]
            at, lengths[text] = end, len(content)
        return np.concatenate([*parts, data[at:]]), np.cumsum(lengths)


@cache
def _small_letters() -> np.ndarray:
    """For each character below CODES its small letter, SPECIAL where that is none of one character, or depends on what is
    around it (the Greek sigma), or needs more than half as many bytes again."""
    codes = np.arange(CODES, dtype="<u4")
    usual = (codes != ord("\u03a3")) & (codes != ord("\u0130")) & ((codes < 0xD800) | (codes > 0xDFFF))
    texts = codes[usual].tobytes().decode("utf-32-le")
    small = np.frombuffer(texts.lower().encode("utf-32-le"), "<u4")
    out = np.full(CODES, SPECIAL, np.uint32)
    if len(small) == len(texts):  # else a newer Unicode has more such letters: all are special
        before, after = (
            sum((side >= bound).astype(int) for bound in (0, 0x80, 0x800, 0x10000)) for side in (codes[usual], small)
        )
        out[usual] = np.where((small < CODES) & (2 * after <= 3 * before), small, SPECIAL)
    return out
