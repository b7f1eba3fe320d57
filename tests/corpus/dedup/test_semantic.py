import json
import random

import numpy as np
import pytest

import tools.dedup
from megalm.config.errors import ConfigError
from megalm.corpus import documents as documents_module
from megalm.corpus.dedup import semantic
from megalm.corpus.dedup.corpus import Corpus
from megalm.corpus.dedup.semantic import embed, find_semantic_duplicates
from tests.texts import sentences
from tools.subcommands import run_tool


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def by_definition(vectors, order, threshold):
    """Who is closer than the threshold to one before it, and to which of those that stay it leads."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    gone: dict[int, int] = {}
    for place, i in enumerate(order):
        before = [j for j in order[:place] if unit[i] @ unit[j] >= threshold and unit[j].any()]
        if before:
            nearest = max(before, key=lambda j: unit[i] @ unit[j])
            gone[i] = gone.get(nearest, nearest)
    return gone


@pytest.mark.parametrize("keep", ["first", "far", "near"])
def test_one_cluster_is_the_definition(tmp_path, monkeypatch, keep):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 600)
    monkeypatch.setattr(semantic, "BLOCK", 16)
    rng = np.random.default_rng(3)
    base = rng.normal(size=(30, 12))
    vectors = np.concatenate(
        (base, base[rng.integers(0, 30, 40)] + rng.normal(size=(40, 12)) * 0.15, np.zeros((2, 12)))
    )
    vectors = rng.permutation(vectors).astype(np.float32)
    source = write(tmp_path / "c.jsonl", [f"document {i}" for i in range(len(vectors))])
    np.save(tmp_path / "e.npy", vectors * 5)
    with Corpus([source]) as corpus:
        assert len(corpus.shards) > 2
        removals = find_semantic_duplicates(corpus, str(tmp_path / "e.npy"), 0.97, 1, keep)
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
        centre = np.fromfile(f"{corpus.folder}/centres", np.float32)
        assert centre @ unit.sum(0) == pytest.approx(np.linalg.norm(unit.sum(0)), rel=1e-5)
        closeness = unit @ centre
        order = {"first": np.arange(72), "far": np.argsort(closeness), "near": np.argsort(-closeness)}[keep]
        expected = by_definition(vectors, order.tolist(), 0.97)
        assert len(expected) > 15 and {number: of for number, of, _ in removals} == expected


def test_clusters_find_nearly_what_one_cluster_finds(tmp_path):
    rng = random.Random(1)
    texts = [sentences(i, 12) for i in range(150)]
    for i in range(60):
        words = texts[i].split()
        words[rng.randrange(len(words))] = "exchanged"
        texts.append(" ".join(words))
    source = write(tmp_path / "c.jsonl", [*texts, "", "?"])
    found = {}
    for clusters in (1, 6):
        with Corpus([source]) as corpus:
            found[clusters] = {number: of for number, of, _ in find_semantic_duplicates(corpus, None, 0.9, clusters)}
    assert found[1] == {150 + i: i for i in range(60)}
    assert len(found[6]) >= 55 and found[6].items() <= found[1].items()


def test_made_embeddings_follow_the_words():
    weights = np.ones(semantic.BINS, np.float32)
    vectors = embed(
        ["the cat sat on the mat", "The CAT sat on the mat!", "a whole other thing, said they", ""], weights
    )
    products = vectors @ vectors.T
    assert products[0, 1] == pytest.approx(1, abs=1e-5) and abs(products[0, 2]) < 0.5 and not vectors[3].any()


def test_embeddings_that_do_not_fit_are_explained(tmp_path):
    source = write(tmp_path / "c.jsonl", ["a", "b", "c"])
    for array, match in (
        (np.zeros((2, 4)), "3 documents"),
        (np.zeros((3, 4), int), "floating"),
        (np.full((3, 4), np.nan), "row 0 .* not finite"),
    ):
        np.save(tmp_path / "e.npy", array)
        with Corpus([source]) as corpus, pytest.raises(ConfigError, match=match):
            find_semantic_duplicates(corpus, str(tmp_path / "e.npy"))
    (tmp_path / "e.npy").write_bytes(b"x")
    with Corpus([source]) as corpus, pytest.raises(ConfigError, match=r"\.npy file"):
        find_semantic_duplicates(corpus, str(tmp_path / "e.npy"))
    with Corpus([source]) as corpus, pytest.raises(ConfigError, match="--keep"):
        find_semantic_duplicates(corpus, keep="last")


def test_command_line_lists_what_went(tmp_path, capsys):
    text = sentences(1, 5)
    source = write(tmp_path / "c.jsonl", [text, sentences(2, 5), text.upper()])
    removed = tmp_path / "gone.jsonl"
    arguments = [
        "semantic",
        source,
        "--output",
        str(tmp_path / "kept.jsonl"),
        "--removed",
        str(removed),
        "--workers",
        "1",
    ]
    assert run_tool(tools.dedup, [*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 1
    row = json.loads(removed.read_text())
    assert row["number"] == 2 and row["duplicate_of"]["number"] == 0 and row["why"].startswith("cosine 1.0")
    assert not (tmp_path / "kept.jsonl.parts").exists()
