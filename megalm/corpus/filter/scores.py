"""What rules may ask of a text: counts in C++ (csrc/text_counts), and shares and means made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter.english import encode_strings, load_word_tables
from megalm.corpus.suffix import load_native

COUNTS = [
    "characters",
    "newlines",
    "words",
    "plain_words",
    "plain_word_characters",
    "alphabetic_words",
    "stop_words",
    "hashes",
    "ellipses",
    "lines",
    "bullet_lines",
    "ellipsis_lines",
    "paragraphs",
    "repeated_paragraphs",
    "repeated_paragraph_characters",
    "runs",
    "repeated_runs",
    "repeated_run_characters",
    "filled_lines",
    "terminal_lines",
    "short_lines",
    "repeated_line_characters",
    "top_2_gram_characters",
    "top_3_gram_characters",
    "top_4_gram_characters",
    "repeated_5_gram_characters",
    "repeated_6_gram_characters",
    "repeated_7_gram_characters",
    "repeated_8_gram_characters",
    "repeated_9_gram_characters",
    "repeated_10_gram_characters",
]
"""In the order of TextCount in csrc/text_counts/op.h."""

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
SHORT_LINE = 30


@dataclass(frozen=True)
class CountSettings:
    """What the counts depend on."""

    stop_words: tuple[str, ...] = STOP_WORDS
    short_line: int = SHORT_LINE


@dataclass(frozen=True)
class Score:
    """A number for each text, of its counts, and what it is in words."""

    help: str
    of: Callable[[Counted], np.ndarray]


@dataclass(frozen=True)
class Counted:
    """Shapes: table int64 [texts, len(COUNTS)]"""

    table: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """One of COUNTS, as float64."""
        return self.table[:, COUNTS.index(name)].astype(np.float64)

    def share(self, part: str, whole: str) -> np.ndarray:
        """A part of a whole; of nothing it is 0."""
        return divide(self.column(part), self.column(whole))


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotients; 0 where the divisor is."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole != 0)


def _count(name: str, help: str) -> Score:
    return Score(help, lambda counted: counted.column(name))


def _share(part: str, whole: str, help: str) -> Score:
    return Score(help, lambda counted: counted.share(part, whole))


def _gram(kind: str, n: int) -> Score:
    help = {
        "top": f"characters of the run of {n} words that occurs most often, at all its places, over all characters",
        "repeated": f"characters of runs of {n} words that were there before, over all characters",
    }[kind]
    return _share(f"{kind}_{n}_gram_characters", "characters", help)


SCORES: dict[str, Score] = {
    "characters": _count("characters", "characters of the text"),
    "words": _count("words", "words, also of punctuation alone"),
    "plain_words": _count("plain_words", "words with anything but symbols"),
    "mean_word_length": _share("plain_word_characters", "plain_words", "mean characters of a word, symbols left out"),
    "alphabetic_word_share": _share("alphabetic_words", "words", "words with a letter, over all words"),
    "stop_words": _count("stop_words", "different stop words that occur"),
    "hash_ratio": _share("hashes", "words", "number signs over words"),
    "ellipsis_ratio": _share("ellipses", "words", "ellipses over words"),
    "lines": _count("lines", "lines"),
    "bullet_line_share": _share("bullet_lines", "lines", "lines that begin with a bullet or a dash"),
    "ellipsis_line_share": _share("ellipsis_lines", "lines", "lines that end in an ellipsis"),
    "repeated_paragraph_share": _share("repeated_paragraphs", "paragraphs", "paragraphs that were there before"),
    "repeated_paragraph_character_share": _share(
        "repeated_paragraph_characters", "characters", "characters of paragraphs that were there before"
    ),
    "repeated_line_share": _share("repeated_runs", "runs", "lines that were there before"),
    "repeated_line_character_share": _share(
        "repeated_run_characters", "characters", "characters of lines that were there before"
    ),
    **{f"top_{n}_gram_share": _gram("top", n) for n in (2, 3, 4)},
    **{f"repeated_{n}_gram_share": _gram("repeated", n) for n in range(5, 11)},
    "filled_lines": _count("filled_lines", "lines with more than white space"),
    "terminal_line_share": _share("terminal_lines", "filled_lines", "filled lines that end as a sentence does"),
    "short_line_share": _share("short_lines", "filled_lines", "filled lines that are short"),
    "repeated_filled_line_character_share": Score(
        "characters of filled lines that were there before, over all but line feeds",
        lambda counted: divide(
            counted.column("repeated_line_characters"), counted.column("characters") - counted.column("newlines")
        ),
    ),
    "newline_ratio": _share("newlines", "words", "line feeds over words"),
}


def load_counter() -> ModuleType:
    """Load the compiled extension.

    Errors: ConfigError where it was not built.
    """
    library = load_native()
    if library is None or not hasattr(library, "text_counts"):
        raise ConfigError(
            "megalm filter counts in C++, and the extension is not built, or of an earlier version: install megalm again "
            "with a C++17 compiler, or from a wheel."
        )
    return library


def count_texts(texts: Texts, settings: CountSettings) -> Counted:
    """The counts of every text.

    Errors: ConfigError where the extension was not built.
    """
    library = load_counter()
    stop_codes, stop_ends = encode_strings(settings.stop_words)
    out = np.empty((len(texts), len(COUNTS)), np.int64)
    inputs = [np.ascontiguousarray(array) for array in (texts.data, texts.ends)]
    library.text_counts(
        *(array.ctypes.data for array in inputs),
        len(texts),
        *make_word_arguments(),
        stop_codes.ctypes.data,
        stop_ends.ctypes.data,
        len(stop_ends),
        settings.short_line,
        out.ctypes.data,
    )
    return Counted(out)


def make_word_arguments() -> tuple[int, ...]:
    """Make the fields of WordRules in csrc/text_counts/op.h; the arrays live as long as the process."""
    t = load_word_tables()
    return (
        t.classes.ctypes.data,
        len(t.classes),
        t.exception_codes.ctypes.data,
        t.exception_ends.ctypes.data,
        len(t.exception_ends),
        t.pieces.ctypes.data,
        t.piece_ends.ctypes.data,
        t.unit_codes.ctypes.data,
        t.unit_ends.ctypes.data,
        len(t.unit_ends),
    )
