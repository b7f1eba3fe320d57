import json

import numpy as np
import pytest

import tools.inspect
from megalm.config.compose import compose_config
from megalm.config.saved import write_config_yaml
from megalm.corpus.tokenize_corpus import Settings
from megalm.corpus.tokenize_job import Job, run_job
from megalm.data.loader import Loader
from megalm.data.look import count_lengths, find_repeated_spans, hash_windows
from megalm.data.tokens import TokenFile
from tests.data.test_loader import axis, write
from tests.texts import documents
from tools.subcommands import run_tool


@pytest.fixture
def prefix(tmp_path, tokenizer_file):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(60)))
    run_job(Job((str(source),), str(tmp_path / "d"), Settings(tokenizer_file)))
    return tmp_path / "d"


def test_histogram_counts_every_document():
    rows = count_lengths(np.array([0, 1, 2, 3, 4, 7, 8]))
    assert [(row["from"], row["to"], row["documents"], row["tokens"]) for row in rows] == [
        (0, 1, 1, 0),
        (1, 2, 1, 1),
        (2, 4, 2, 5),
        (4, 8, 2, 11),
        (8, 16, 1, 8),
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 13])
def test_window_hashes_are_equal_where_windows_are(length):
    tokens = np.random.default_rng(length).integers(0, 3, 400)
    hashes = hash_windows(tokens, length)
    windows = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    assert len(hashes) == len(windows)
    assert len(set(hashes.tolist())) == len(set(windows))
    assert len(set(zip(hashes.tolist(), windows, strict=True))) == len(set(windows))


def test_repeated_spans_are_found_and_extended(tmp_path):
    rng = np.random.default_rng(0)
    noise = lambda n: rng.integers(100, 60_000, n)  # noqa: E731
    long, often = np.arange(50, 90), np.arange(10, 26)
    parts = [noise(50), long, noise(20), often, noise(30), often, noise(9), long, noise(3), often, noise(40)]
    file = TokenFile(write(tmp_path / "r", [np.concatenate(parts)]))
    spans = find_repeated_spans(file, 8, 5)
    assert [(s["times"], s["tokens"]) for s in spans] == [(3, 16), (2, 40)]
    assert [s["token"] for s in spans] == [110, 50]


def test_data_is_shown(prefix, capsys):
    assert run_tool(tools.inspect, ["data", str(prefix), "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    texts = documents(60)
    assert result["documents"] == 60 and result["verified"]
    for row in result["samples"]:
        assert texts[row["document"]].startswith(row["text"][:40].removesuffix("<|endoftext|>"))
    assert run_tool(tools.inspect, ["data", str(prefix)]) == 0
    assert "60 documents" in capsys.readouterr().out
    assert run_tool(tools.inspect, ["data", str(prefix) + "x"]) == 2


def test_documents_are_shown_with_the_input_they_came_from(tokenizer_file, tmp_path, capsys):
    for name, count in (("b", 5), ("a", 9), ("c", 2)):
        lines = [json.dumps({"text": f"{name} {i}", "lang": "x" if i % 2 else "y"}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    inputs = tuple(str(tmp_path / f"{name}.jsonl") for name in "bac")
    settings = Settings(tokenizer_file, language_field="lang")
    run_job(Job(inputs, str(tmp_path / "d"), settings, mds=True))
    for place in (tmp_path / "d", tmp_path / "d_mds", f"file://{tmp_path}/d", f"file://{tmp_path}/d_mds"):
        assert run_tool(tools.inspect, ["data", str(place), "--samples", "16", "--spans", "0", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["samples"]
        assert sorted(row["document"] for row in rows) == list(range(16))
        if "://" in str(place):  # what lies beside it is not looked for far away
            continue
        for row in rows:
            assert row["source"] == str(tmp_path / f"{row['text'][0]}.jsonl"), row
    assert run_tool(tools.inspect, ["data", str(tmp_path / "d"), "--samples", "1"]) == 0
    assert ".jsonl: " in capsys.readouterr().out


def test_batch_of_a_step_is_what_the_loader_gave(prefix, tokenizer_file, tmp_path, capsys):
    config = compose_config(
        [
            "+model=tiny",
            f"data.train=[{prefix}]",
            f"data.tokenizer={tokenizer_file}",
            "model.vocab_size=400",
            "model.seq_length=16",
        ]
        + ["train.global_batch_size=4", "train.micro_batch_size=2"]
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(write_config_yaml(config))
    loader = Loader(config, axis())
    loader.next()
    loader.skip(4, 7)
    batches = loader.next()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 2, "samples": loader.samples_consumed}) + "\n")
    assert run_tool(tools.inspect, ["batch", str(run), "--step", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    file = TokenFile(prefix)
    shown = [file.read(row["token"], row["token"] + 16).tolist() for row in result["samples"]]
    assert shown == [row for batch in batches for row in batch.tokens.tolist()]
    assert result["recorded"] and [row["position"] for row in result["samples"]] == [7, 8, 9, 10]
    assert run_tool(tools.inspect, ["batch", str(run), "--step", "1"]) == 0
    assert "sample 0 of the stream: d" in capsys.readouterr().out
    assert run_tool(tools.inspect, ["batch", str(tmp_path), "--step", "1"]) == 2
