"""What the page of `megalm filter --statistics` is made of: shares that limits drop, and the texts nearest to them."""

import json

import numpy as np
import pytest

from megalm.corpus import documents as documents_module
from megalm.corpus.dedup.corpus import Corpus
from megalm.corpus.engine import make_engine
from megalm.corpus.filter.job import filter_documents
from megalm.corpus.filter.rules import make_rules
from megalm.corpus.filter.statistics import NEAREST, SHARES, describe_scores, gather_thresholds
from tools.filter.__main__ import main

RULES = [
    {"score": "words", "at_least": 20, "at_most": 70},
    {"name": "long", "score": "characters", "at_most": 200},
    {"field": "rating", "missing": "keep"},
]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 3000)  # several shards
    path = tmp_path / "in.jsonl"
    texts = [("word " * (1 + 37 * number % 101)).strip() for number in range(200)]
    rows = [{"text": text, **({"rating": number} if number % 2 else {})} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, np.array([len(text.split()) for text in texts])


def watched(path, workers=1):
    contents = [{"rules": RULES}]
    with make_engine("local", workers) as engine, Corpus([str(path)], engine=engine) as corpus:
        outcome = filter_documents(corpus, contents, watch=True)
        rules = make_rules(contents)
        return outcome, list(describe_scores(corpus, rules)), gather_thresholds(corpus, rules)


def test_rules_are_counted_first_alone_and_only(source):
    path, words = source
    outcome, _, _ = watched(path)
    by_words, by_length = (words < 20) | (words > 70), 5 * words - 1 > 200
    assert outcome.by_rule == {"words": by_words.sum(), "long": (by_length & ~by_words).sum(), "rating": 0}
    assert (outcome.alone["words"].drops, outcome.alone["long"].drops) == (by_words.sum(), by_length.sum())
    assert outcome.alone["words"].only == (by_words & ~by_length).sum()
    assert outcome.alone["long"].only == (by_length & ~by_words).sum()


def test_limits_drop_the_share_that_is_said(source):
    path, words = source
    _, (found, _, rating), _ = watched(path)
    assert found.known == 200 and found.counts.sum() == 200 and rating.known == 100
    for share, low, high in zip(SHARES, found.below, found.above, strict=True):
        assert (words < low).mean() <= share + 1e-9 and (words <= low).mean() >= share - 1e-9
        assert (words > high).mean() <= share + 1e-9 and (words >= high).mean() >= share - 1e-9


def test_the_texts_nearest_to_a_limit_are_shown(source):
    path, words = source
    _, _, thresholds = watched(path)
    assert [(one.rule, one.limit, one.is_least) for one in thresholds] == [
        ("words", 20, True),
        ("words", 70, False),
        ("long", 200, False),
    ]
    dropped = sorted(words[words < 20], reverse=True)[:NEAREST]
    kept = sorted(words[words >= 20])[:NEAREST]
    assert [one.value for one in thresholds[0].dropped.samples] == dropped
    assert [one.value for one in thresholds[0].kept.samples] == kept
    assert all(len(one.text.split()) == one.value for one in thresholds[0].kept.samples)


def test_the_page_is_the_same_whatever_the_workers(source, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(json.dumps({"rules": RULES}))
    pages = []
    for workers in ("1", "2"):
        page = tmp_path / f"{workers}.html"
        command = [str(source[0]), "--rules", str(tmp_path / "r.yaml"), "--statistics", str(page), "--workers", workers]
        assert main(command) == 0
        pages.append(page.read_text())
    assert pages[0] == pages[1] and "<script" not in pages[0]
    for word in ("What a limit would drop", "kept, nearest to at least 20", "in.jsonl: byte"):
        assert word in pages[0]
    assert main([*command[:-4], "--statistics", str(tmp_path / "no" / "p.html"), "--workers", "1"]) == 2
    assert "choose another place" in capsys.readouterr().err


def test_scores_that_are_all_alike_or_missing(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "one two"}\n' * 3)
    _, (words, characters, rating), _ = watched(path)
    assert words.counts.sum() == 3 and words.mean == 2 and characters.mean == 7 and rating.known == 0
