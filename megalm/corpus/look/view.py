"""What the page shows of a sample: lengths, scores, languages, personal data, duplicates, clusters, repeated spans."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter.language import UNKNOWN, load_detector
from megalm.corpus.filter.lists import PII, is_public
from megalm.corpus.filter.scores import SCORES, CountSettings, count_texts
from megalm.corpus.look.clusters import cluster_texts
from megalm.corpus.look.repeats import find_duplicates, find_spans
from megalm.corpus.look.sample import Sample, Seen

PAGE = Path(__file__).parent / "page.html"
SHOWN = 2000  # characters of a text that the page holds
LOOKED_AT = 20_000  # characters of a text that clusters, spans and languages look at
SCORED = (
    "characters", "words", "mean_word_length", "alphabetic_word_share", "stop_words", "hash_ratio", "bullet_line_share",
    "repeated_line_share", "top_2_gram_share", "repeated_5_gram_share", "terminal_line_share", "short_line_share",
)  # fmt: skip
MOST_FIELDS = 24  # numbers of the documents' own that become columns
WORDS = re.compile(r"\w{2,}")

View = dict[str, Any]
"""What the page's script reads (megalm/corpus/look/page.html)."""


def make_view(
    sample: Sample, clusters: int, losses: Mapping[str, float] | None = None, characters: int = SHOWN
) -> View:
    """Measures the sample, and gives what the page shows.

    losses: bits per byte of documents by their keys, under a model.
    """
    documents = sample.documents
    texts = Texts.of(document.text for document in documents)
    begins = Texts.of(document.text[:LOOKED_AT] for document in documents)
    words = [WORDS.findall(document.text[:LOOKED_AT].lower()) for document in documents]
    found = cluster_texts(begins, words, clusters)
    twins = find_duplicates(texts, [document.key for document in documents])
    languages = _find_languages(documents)
    columns = _measure(documents, texts, losses)
    pii = [find_pii(document.text) for document in documents]
    columns["personal data"] = (
        "places that look like it: e-mail, public IP, telephone, keys",
        [float(len(p)) for p in pii],
    )
    rows = [
        {
            "key": document.key,
            "source": document.source,
            "place": document.place,
            "text": document.text[:characters],
            "characters": len(document.text),
            "cluster": int(found.of[number]),
            "language": languages[number],
            "group": int(twins.group[number]),
            "pii": _in_utf16(document.text[:characters], pii[number]),
            "values": [_short(values[number]) for _, values in columns.values()],
        }
        for number, document in enumerate(documents)
    ]
    return {
        "name": sample.name,
        "sources": [vars(source) for source in sample.sources],
        "columns": [{"name": name, "help": help} for name, (help, _) in columns.items()],
        "clusters": found.names,
        "spans": [vars(span) for span in find_spans(words)],
        "exact": twins.exact,
        "near": twins.near,
        "bad": sample.bad[:50],
        "bad_count": len(sample.bad),
        "documents": rows,
    }


def render_page(view: View, labels: Mapping[str, str | None], live: bool) -> str:
    """One page with everything in it; live: it asks the server that it came from for the rest, and gives it labels."""
    content = json.dumps({**view, "labels": dict(labels), "live": live}, ensure_ascii=False)
    held = content.replace("<", "\\u003c").encode("utf-8", "replace").decode()
    return PAGE.read_text(encoding="utf-8").replace("{{VIEW}}", held, 1)


def find_pii(text: str) -> list[tuple[int, int, str]]:
    """(begin, end, kind) of what looks like personal data, in their order; none inside another."""
    found: list[tuple[int, int, str]] = []
    for kind, pattern in PII.items():
        if (kind == "email" and "@" not in text) or (kind == "ip" and "." not in text):
            continue
        for match in pattern.finditer(text):
            if kind != "ip" or is_public(match.group()):
                found.append((*match.span(), kind))
    alone: list[tuple[int, int, str]] = []
    for one in sorted(found):
        if not alone or one[0] >= alone[-1][1]:
            alone.append(one)
    return alone


def _in_utf16(text: str, spans: Sequence[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """The places as a script counts them: characters beyond U+FFFF are two there."""
    if not spans:
        return []
    before = np.concatenate(([0], np.cumsum([1 + (character > "\uffff") for character in text])))
    return [(int(before[begin]), int(before[end]), kind) for begin, end, kind in spans if end <= len(text)]


def _find_languages(documents: Sequence[Seen]) -> list[str]:
    """Empty where the library is not installed."""
    try:
        detect = load_detector("pycld2")
    except ConfigError:
        return [""] * len(documents)
    codes = [detect(document.text[:LOOKED_AT])[0][0] for document in documents]
    return ["unknown" if code == UNKNOWN else code for code in codes]


def _measure(
    documents: Sequence[Seen], texts: Texts, losses: Mapping[str, float] | None
) -> dict[str, tuple[str, list[float]]]:
    """Name of each column -> what it is, and a number of each document; NaN where it has none."""
    columns: dict[str, tuple[str, list[float]]] = {}
    if losses is not None:
        values = [losses.get(document.key, float("nan")) for document in documents]
        columns["loss"] = ("bits per byte under the model: the highest are the hardest texts", values)
    if any(document.tokens >= 0 for document in documents):
        columns["tokens"] = ("tokens of the document", [float(document.tokens) for document in documents])
    counted = count_texts(texts, CountSettings())
    for name in SCORED:
        columns[name] = (SCORES[name].help, SCORES[name].of(counted).tolist())
    for name in _list_numbers(documents):
        columns[name] = (
            "a field of the documents",
            [_number(_flatten(document.fields).get(name)) for document in documents],
        )
    return columns


def _list_numbers(documents: Sequence[Seen]) -> list[str]:
    found: dict[str, None] = {}
    for document in documents[:200]:
        found |= {name: None for name, value in _flatten(document.fields).items() if not np.isnan(_number(value))}
    return list(found)[:MOST_FIELDS]


def _flatten(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, and those in them as megalm filter writes its scores: `filter.scores.words`."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": one for inner, one in _flatten(value).items()}
        else:
            found[name] = value
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def read_losses(path: str) -> dict[str, float]:
    """Read bits per byte of documents by their keys.

    Errors: ConfigError for a file that is not there, or has other lines.
    """
    found: dict[str, float] = {}
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    found[str(row["key"])] = float(row["loss"])
    except OSError as error:
        raise ConfigError(f"losses {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f'{path}: line {number} has no key and loss, as in {{"key": "ab12", "loss": 0.8}}.') from None
    return found
