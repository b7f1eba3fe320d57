"""A classifier out of two sets of texts: what it tells apart, what it says of itself, what it refuses."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter.classifier import BITS, FORMAT, Features, load_classifier, make_features, train_classifier
from tests.corpus.filter.test_rules import run
from tools.filter.__main__ import main

WORDS = [f"word{number}" for number in range(400)]


def texts(count, seed, share):
    """Texts of which this share of the words is of the second half of the vocabulary."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        words = [rng.choice(WORDS[200:] if rng.random() < share else WORDS[:200]) for _ in range(rng.randint(20, 60))]
        made.append(" ".join(words))
    return made


def write(path, rows):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return str(path)


@pytest.fixture
def trained(tmp_path, capsys):
    good, bad = write(tmp_path / "good.jsonl", texts(600, 1, 0.65)), write(tmp_path / "bad.jsonl", texts(600, 2, 0.35))
    model = tmp_path / "model.safetensors"
    assert main(["train", "--good", good, "--bad", bad, "--output", str(model), "--json"]) == 0
    return model, json.loads(capsys.readouterr().out)


def test_sets_are_told_apart_and_probabilities_mean_what_they_say(trained):
    _, quality = trained
    assert quality["texts"] == 240 and quality["auc"] > 0.97 and quality["accuracy"] > 0.9
    assert quality["calibration_error"] < 0.15
    for rate, limit, kept in quality["thresholds"]:
        assert 0 <= limit <= 1 and kept >= rate


def test_a_rule_keeps_what_resembles_the_first_set(trained, tmp_path):
    model, _ = trained
    fresh = [*texts(50, 3, 0.7), *texts(50, 4, 0.3)]
    batch, why = run([{"classifier": str(model), "at_least": 0.5}], fresh)
    assert sum(one is None for one in why[:50]) > 45 and sum(one == "quality" for one in why[50:]) > 45
    (tmp_path / "r.yaml").write_text("rules:\n- {classifier: model.safetensors, at_least: 0.5, score_name: liked}\n")
    source, out = write(tmp_path / "in.jsonl", fresh), tmp_path / "o.jsonl"
    command = [source, "--rules", str(tmp_path / "r.yaml"), "--output", str(out), "--label-only", "--workers", "1"]
    assert main(command) == 0
    labelled = [json.loads(line)["filter"]["scores"]["liked"] for line in out.open()]
    assert np.allclose(labelled, batch.columns["quality"], atol=1e-6)


def test_the_same_texts_give_the_same_file(trained, tmp_path):
    model, _ = trained
    first = model.read_bytes()
    command = [
        "train",
        "--good",
        str(tmp_path / "good.jsonl"),
        "--bad",
        str(tmp_path / "bad.jsonl"),
        "--output",
        str(model),
    ]
    assert main(command) == 0 and model.read_bytes() == first
    assert main([*command, "--max-documents", "200"]) == 0 and model.read_bytes() != first


def test_the_area_is_that_of_all_pairs():
    rng = np.random.default_rng(0)

    def make(count, shift):
        buckets = (rng.integers(0, 40, (count, 6)) + shift).astype(np.uint32)
        return Features(buckets.reshape(-1), np.arange(count + 1) * 6)

    good, bad = make(100, 10), make(150, 0)
    classifier, quality = train_classifier(good, bad)
    held = [one.some(np.arange(4, len(one), 5)).scores(classifier.weights, classifier.bias) for one in (good, bad)]
    pairs = np.subtract.outer(*held)
    assert np.isclose(quality.auc, (pairs > 0).mean() + (pairs == 0).mean() / 2) and quality.auc > 0.6


def test_features_are_those_of_each_text_alone():
    some = ["one two three", "", "Two, one", "日本語"]
    together = make_features(Texts.of(some))
    for number, text in enumerate(some):
        alone = make_features(Texts.of([text])).buckets
        assert (together.some(np.array([number])).buckets == alone).all()
    assert len(make_features(Texts.of(["one two three"])).buckets) == 5


def test_other_files_and_too_few_texts_are_refused(tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_file({"weights": np.zeros(3, np.float32)}, str(other))
    with pytest.raises(ConfigError, match="other tensors"):
        load_classifier(str(other))
    save_file({"weights": np.zeros(3, np.float32)}, str(other), {"classifier": json.dumps({"format": FORMAT})})
    load_classifier.cache_clear()
    with pytest.raises(ConfigError, match=rf"not float32 \({1 << BITS},\)"):
        load_classifier(str(other))
    (tmp_path / "text").write_text("no tensors")
    for path in (tmp_path / "text", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="train one by `megalm filter train`"):
            run([{"classifier": str(path)}], ["a"])
    few = write(tmp_path / "few.jsonl", ["a b"] * 3)
    assert main(["train", "--good", few, "--bad", few, "--output", str(tmp_path / "m")]) == 2
    assert "--good has 3 texts: give at least 20" in capsys.readouterr().err
