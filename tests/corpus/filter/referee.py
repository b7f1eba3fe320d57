"""datatrove's decisions on texts, for the tests that compare ours with them."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest

from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter.batch import STAYS, Batch
from megalm.corpus.filter.rules import make_rules, read_rules


def load_datatrove(preset: str) -> list[Any]:
    """datatrove's filters that a preset stands for, in their order."""
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    gopher = [GopherRepetitionFilter(), GopherQualityFilter()]
    return {
        "gopher": gopher,
        "gopher_quality": gopher[1:],
        "gopher_repetition": gopher[:1],
        "c4": [C4QualityFilter()],
        "fineweb_quality": [FineWebQualityFilter()],
        "fineweb": [*gopher, C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()],
    }[preset]


def judge_by_datatrove(preset: str, texts: Sequence[str]) -> list[tuple[bool, str, str]]:
    """Of each text: whether it stays, why not, and what the filters made of it."""
    from datatrove.data import Document

    filters, found = load_datatrove(preset), []
    for number, text in enumerate(texts):
        document, reason = Document(text=text, id=str(number)), ""
        for one in filters:
            result = True
            with contextlib.suppress(ZeroDivisionError):  # a text without words: the filters after it say so
                result = one.filter(document)
            stays, reason = result if isinstance(result, tuple) else (result, "")
            if not stays:
                break
        found.append((not reason, reason, document.text))
    return found


def judge(preset: str, texts: Sequence[str]) -> list[tuple[bool, str, str]]:
    """The same by ours."""
    rules = make_rules(read_rules([preset]))
    batch = Batch(Texts.of(texts), [{} for _ in texts], rules.settings)
    rules.apply(batch)
    names = [*rules.names, ""]
    return [
        (number == STAYS, names[number], text)
        for number, text in zip(batch.dropped_by.tolist(), batch.texts, strict=True)
    ]
