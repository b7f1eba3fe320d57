"""Steps that change texts: lines as C4 cleans them, repaired Unicode, normal forms."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter.batch import Batch
from megalm.corpus.filter.scores import load_counter, make_word_arguments

LINE_COUNTS = [
    "long_word_lines",
    "unended_lines",
    "few_word_lines",
    "javascript_lines",
    "policy_lines",
    "staying_lines",
    "sentences",
    "lorem_ipsum_lines",
    "curly_bracket_lines",
]
"""In the order of LineCount in csrc/clean_lines/op.h."""
Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True)
class CleanLines:
    """Lines as C4 keeps them (csrc/clean_lines)."""

    max_word_length: int = 1000
    min_words: int = 3
    terminal: bool = True
    gives = tuple(LINE_COUNTS)
    needs_fields = False

    def apply(self, batch: Batch) -> None:
        """Takes lines and citations off; gives LINE_COUNTS."""
        library, texts = load_counter(), batch.texts
        data, ends = np.ascontiguousarray(texts.data), np.ascontiguousarray(texts.ends)
        out, out_ends = np.empty(len(data), np.uint8), np.empty(len(texts), np.int64)
        counts = np.empty((len(texts), len(LINE_COUNTS)), np.int64)
        library.clean_lines(
            data.ctypes.data,
            ends.ctypes.data,
            len(texts),
            *make_word_arguments(),
            self.max_word_length,
            self.min_words,
            self.terminal,
            *(array.ctypes.data for array in (out, out_ends, counts)),
        )
        used = int(out_ends[-1]) if len(texts) else 0
        out = out[:used]
        batch.change(Texts(out, out_ends, _all_ascii(out, out_ends)))
        for number, name in enumerate(LINE_COUNTS):
            batch.give(name, counts[:, number])


def _all_ascii(data: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Of each text, whether it is all ASCII."""
    beyond = np.concatenate(([0], np.cumsum(data >= 0x80)))
    return np.diff(beyond[ends], prepend=0) == 0


@dataclass(frozen=True)
class Repair:
    """Mends text that was decoded wrongly, by ftfy, and leaves quotes, widths and ligatures as they are."""

    gives = ()
    needs_fields = False

    def apply(self, batch: Batch) -> None:
        """Repairs every text; one of ASCII alone has nothing to repair but control characters and escapes."""
        batch.change(Texts.of(map(load_repair(), batch.texts)))


@cache
def load_repair() -> Callable[[str], str]:
    """Errors: ConfigError where ftfy is not installed."""
    try:
        import ftfy
    except ImportError as error:
        raise ConfigError("the edit `repair` needs ftfy: `pip install ftfy`.") from error
    kept: dict[str, Any] = {
        "fix_latin_ligatures": False,
        "fix_character_width": False,
        "uncurl_quotes": False,
        "fix_line_breaks": False,
        "normalization": None,
    }
    config = ftfy.TextFixerConfig(**kept)
    return lambda text: ftfy.fix_text(text, config)


@dataclass(frozen=True)
class Normalize:
    """Writes characters in one of Unicode's normal forms."""

    form: Form = "NFC"
    gives = ()
    needs_fields = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"the edit `normalize` has the form {self.form!r}: choose one of {', '.join(FORMS)}.")

    def apply(self, batch: Batch) -> None:
        """Normalizes every text."""
        batch.change(Texts.of(unicodedata.normalize(self.form, text) for text in batch.texts))
