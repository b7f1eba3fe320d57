"""Which language a text is in, by an installed library that works offline."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.filter.batch import Batch

LIBRARIES = ("pycld2", "py3langid")
"""The fast one (Apache-2.0) and the one with more of the rare languages right (BSD): docs/filtering.md has the table."""
_SAME = {"iw": "he", "jw": "jv", "nb": "no", "nn": "no", "sh": "sr", "tl": "fil", "zh-Hant": "zh", "zh-hant": "zh"}
UNKNOWN = "und"


@dataclass(frozen=True)
class Language:
    """How much of a text is in one of these languages, and which one the library takes it for."""

    languages: tuple[str, ...]
    by: str = LIBRARIES[0]
    gives = ("language",)
    needs_fields = False

    def __post_init__(self) -> None:
        if self.by not in LIBRARIES:
            raise ConfigError(f"a rule finds the language by {self.by!r}: choose one of {', '.join(LIBRARIES)}.")
        long = [one for one in self.languages if not 2 <= len(one) <= 3 or not one.isalpha()]
        if long:
            raise ConfigError(f"language {long[0]!r}: give codes of ISO 639, such as en, de or zh.")

    def apply(self, batch: Batch) -> None:
        """Gives the score, and the label `language`.

        Errors: ConfigError where the library is not installed.
        """
        detect = load_detector(self.by)
        wanted = {simplify_code(code) for code in self.languages}
        found = [detect(text) for text in batch.texts]
        batch.give("language", np.array([sum(share for code, share in shares if code in wanted) for shares in found]))
        batch.labels["language"] = [shares[0][0] for shares in found]


def simplify_code(code: str) -> str:
    """One code for what libraries call by several: older codes, the two forms of Norwegian, scripts of Chinese."""
    return _SAME.get(code, code)


@cache
def load_detector(library: str) -> Callable[[str], list[tuple[str, float]]]:
    """Load a function that gives languages with their shares of a text, the largest first; UNKNOWN where there is none.

    Errors: ConfigError where the library is not installed.
    """
    try:
        return _load_pycld2() if library == "pycld2" else _load_py3langid()
    except ImportError as error:
        raise ConfigError(f"a rule on language needs {library}: `pip install {library}`.") from error


def _load_pycld2() -> Callable[[str], list[tuple[str, float]]]:
    """Compact Language Detector 2: shares are those of the bytes of up to three languages."""
    import pycld2

    def detect(text: str) -> list[tuple[str, float]]:
        try:
            details = pycld2.detect(text)[2]
        except pycld2.error:  # it takes no control characters
            kept = (one for one in text if unicodedata.category(one) not in ("Cc", "Cs", "Cn", "Co"))
            details = pycld2.detect("".join(kept))[2]
        shares = [(simplify_code(code), percent / 100) for _, code, percent, _ in details if code != "un"]
        return shares or [(UNKNOWN, 1.0)]

    return detect


def _load_py3langid() -> Callable[[str], list[tuple[str, float]]]:
    """Load a naive Bayes classifier: the share is the probability of the language that it chooses."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def detect(text: str) -> list[tuple[str, float]]:
        code, probability = identifier.classify(text)
        return [(simplify_code(code), float(probability))]

    return detect
