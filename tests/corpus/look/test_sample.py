"""A sample of a corpus of any size: each document as likely as any other, in bounded reads; and searches over everything."""

import json
import threading

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.corpus.look.labels import make_key
from megalm.corpus.look.sample import sample_corpus
from megalm.corpus.look.search import Search
from megalm.corpus.look.view import make_view, read_losses, render_page


def write(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))
    return str(path)


def test_a_small_corpus_is_there_whole_and_exactly_counted(tmp_path):
    files = [write(tmp_path / "a.jsonl", ["one", "two"]), write(tmp_path / "b.jsonl", ["three"])]
    sample = sample_corpus(files, 100)
    assert [one.text for one in sample.documents] == ["one", "two", "three"]
    assert [(source.documents, source.exact) for source in sample.sources] == [(2, True), (1, True)]
    assert sample.documents[0].key == make_key("one")


def test_the_same_seed_gives_the_same_sample_and_long_texts_are_no_likelier(tmp_path):
    texts = [f"{n} " + "word " * (400 if n % 2 else 4) for n in range(30_000)]
    file = write(tmp_path / "a.jsonl", texts)
    sample, again, other = (sample_corpus([file], 1000, seed) for seed in (0, 0, 1))
    keys = [one.key for one in sample.documents]
    assert keys == [one.key for one in again.documents] != [one.key for one in other.documents]
    assert len(keys) == len(set(keys)) == 1000
    long = np.mean([len(one.text) > 100 for one in sample.documents])
    assert 0.4 < long < 0.6
    assert not sample.sources[0].exact and abs(sample.documents_there / 30_000 - 1) < 0.1


def test_sources_are_told_apart_by_a_field(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"text": f"text {n}", "meta": {"source": "forum" if n % 3 else "books"}} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = sample_corpus([str(file)], 100, by="meta.source")
    assert {source.name: source.documents for source in sample.sources} == {"forum": 20, "books": 10}


def test_everything_is_searched_with_an_index_and_without(tmp_path):
    texts = [f"number {n} " + "filler words " * 20 for n in range(3000)]
    texts[2345] = "a needle in the hay"
    file = write(tmp_path / "a.jsonl", texts)
    sample = sample_corpus([file], 10)
    plain, indexed = Search(sample.files, "text", None), Search(sample.files, "text", str(tmp_path / "index"))
    indexed.build(threading.Event())
    for search in (plain, indexed):
        found = search.find("NEEDLE in the")
        assert [row["text"] for row in found["documents"]] == ["a needle in the hay"]
        assert search.find("nothing-like-it")["documents"] == []


def test_what_was_hard_to_learn_is_shown_first(tmp_path):
    file = write(tmp_path / "a.jsonl", ["easy words", "hard words"])
    losses = tmp_path / "losses.jsonl"
    keys = [make_key(text) for text in ("easy words", "hard words")]
    losses.write_text("".join(json.dumps({"key": k, "loss": v}) + "\n" for k, v in zip(keys, (0.5, 4.0), strict=True)))
    view = make_view(sample_corpus([file], 10), 2, read_losses(str(losses)), 100)
    column = [one["name"] for one in view["columns"]].index("loss")
    assert [row["values"][column] for row in view["documents"]] == [0.5, 4.0]
    losses.write_text('{"loss": 1}\n')
    with pytest.raises(ConfigError, match="losses"):
        read_losses(str(losses))


def test_a_text_cannot_break_out_of_the_page(tmp_path):
    file = write(tmp_path / "a.jsonl", ["</script><script>alert(1)</script>"])
    page = render_page(make_view(sample_corpus([file], 10), 1, None, 100), {}, live=False)
    assert "<script>alert(1)" not in page
