"""Many texts, held as their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


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

    def __iter__(self) -> Iterator[str]:
        return (str(content, "utf-8") for content in self.contents())

    def in_lower_case(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes, with every letter small but those of texts that are all ASCII, and where each text ends."""
        if self.ascii.all():
            return self.data, self.ends
        lengths = np.diff(self.ends, prepend=0)
        parts, at = [], 0
        for text in np.flatnonzero(~self.ascii).tolist():
            end = int(self.ends[text])
            start = end - int(lengths[text])
            content = str(self.data[start:end].data, "utf-8").lower().encode("utf-8")
            parts += [self.data[at:start], np.frombuffer(content, np.uint8)]
            at, lengths[text] = end, len(content)
        return np.concatenate([*parts, self.data[at:]]), np.cumsum(lengths)
