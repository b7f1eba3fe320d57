"""The same result from every engine, also with a worker killed on the way. Spark and Ray start on this machine."""

import gzip
import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.corpus import documents as documents_module
from megalm.corpus import tokenize_corpus
from megalm.corpus.dedup import contamination, exact, near, semantic
from megalm.corpus.dedup.corpus import Corpus
from megalm.corpus.dedup.removal import write_lists
from megalm.corpus.dedup.substring import find_repeated_token_spans
from megalm.corpus.dedup.text_spans import cut_repeated_text
from megalm.corpus.engine import ENGINES, LocalEngine, make_engine
from megalm.corpus.tokenize_corpus import Settings, ShardTask
from megalm.corpus.tokenize_job import Job, run_job
from megalm.data.tokens import TokenFile
from tests.data.test_loader import write
from tests.texts import documents
from tools import corpus_options as options_module
from tools.dedup.__main__ import main as dedup


def double(number):
    if number == 13:
        raise ConfigError("thirteen is not wanted")
    return 2 * number


def suicidal(number):
    os.kill(os.getpid(), signal.SIGKILL)


def fragile_shard(task: ShardTask):
    """Kills its process in the middle of the second shard, once."""
    mark = Path(task.folder, "..", "killed")
    if task.number == 1 and not mark.exists():
        mark.touch()
        Path(task.folder, f"000001.tokens.{os.getpid()}.partial").write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
    return tokenize_corpus.encode_shard(task)


def fragile_part(task):
    """Kills its process at the second part, once."""
    mark = Path(task.folder, "..", "killed")
    if task.part == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return verify_part(task)


verify_part = near._verify_part


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    if request.param == "spark":
        pytest.importorskip("pyspark")
        if subprocess.run(["java", "-version"], capture_output=True).returncode:
            pytest.skip("no Java")
    if request.param == "ray":
        pytest.importorskip("ray")
    with make_engine(request.param, 2) as engine:
        yield engine


def test_every_task_once(engine):
    assert sorted(engine.map(double, range(12))) == list(range(0, 24, 2))
    assert list(engine.map(double, [])) == []
    with pytest.raises(ConfigError, match="thirteen is not wanted"):
        list(engine.map(double, [12, 13, 14]))


class Unclosed:
    """Lends an engine to a job that closes its own."""

    def __init__(self, engine):
        self.engine = engine

    def __enter__(self):
        return self.engine

    def __exit__(self, *error):
        pass


def test_the_tokens_are_the_same_with_a_worker_killed(engine, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 5000)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(120)))
    run_job(Job((str(source),), str(tmp_path / "plain"), Settings(tokenizer_file)))
    monkeypatch.setattr(tokenize_corpus, "encode_shard", fragile_shard)
    outcome = run_job(
        Job((str(source),), str(tmp_path / "engine"), Settings(tokenizer_file)), None, lambda: Unclosed(engine)
    )
    assert outcome.documents == 120 and (tmp_path / "killed").exists()
    for part in ("bin", "idx"):
        mine, other = (Path(f"{tmp_path}/{name}_text_document.{part}").read_bytes() for name in ("plain", "engine"))
        assert mine == other


def test_near_duplicates_are_the_same_with_a_worker_killed(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 12_000)
    source = tmp_path / "in.jsonl"
    texts = documents(100)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[20:60], "x y z"]))

    def lists(name, engine):
        with Corpus([str(source)], engine=engine, folder=str(tmp_path / name / "parts")) as corpus:
            assert len(corpus.shards) > 3
            removals, pairs = near.find_near_duplicates(corpus)
            counts = write_lists(corpus, removals, str(tmp_path / name / "kept"), str(tmp_path / name / "gone"))
        assert counts.removed == 40 == len(pairs)
        return [(tmp_path / name / part).read_bytes() for part in ("kept", "gone")]

    plain = lists("plain", LocalEngine(1))
    monkeypatch.setattr(near, "_verify_part", fragile_part)
    assert lists("engine", engine) == plain and (tmp_path / "engine" / "killed").exists()


WAYS = {
    "exact": ([], exact, "_compare_parts"),
    "semantic": (["--clusters", "4", "--threshold", "0.9"], semantic, "_compare_cluster"),
    "against": (["--evaluation", "EVALUATION", "--words", "6"], contamination, "_search_shard"),
}
STAGES = {way: getattr(module, name) for way, (_, module, name) in WAYS.items()}


def fragile_stage(way, task):
    """Kills its process at the second task, once."""
    mark = Path(task.folder, "..", "killed")
    if (task.part if hasattr(task, "part") else task.shard.number) == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return STAGES[way](task)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_with_a_worker_killed(engine, way, tmp_path, monkeypatch):
    """Through the tool, on the engine that is there."""
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 12_000)
    texts = documents(100)
    for name, content in (("in.jsonl", [*texts, *texts[20:60]]), ("evaluation.jsonl", texts[5:15])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in content))
    options, module, stage = WAYS[way]
    options = [str(tmp_path / "evaluation.jsonl") if option == "EVALUATION" else option for option in options]

    def lists(name, runs):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(options_module, "make_engine", lambda *_: Unclosed(runs))
        paths = [str(tmp_path / name / part) for part in ("kept", "gone")]
        results = ["--output", paths[0], "--removed", paths[1], "--json"]
        assert dedup([way, str(tmp_path / "in.jsonl"), *options, *results]) == 0
        return [Path(path).read_bytes() for path in paths]

    plain = lists("plain", LocalEngine(1))
    assert plain[1].count(b"\n") >= 10
    fragile = partial(fragile_stage, way)
    fragile.__name__ = stage  # by which an interrupted run knows it
    monkeypatch.setattr(module, stage, fragile)
    assert lists("engine", engine) == plain and (tmp_path / "engine" / "killed").exists()


def test_a_compressed_file_is_dealt_out_by_every_engine(engine, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 3000)
    source, packed = tmp_path / "in.jsonl", tmp_path / "in.jsonl.gz"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(120)))
    packed.write_bytes(gzip.compress(source.read_bytes()))
    run_job(Job((str(source),), str(tmp_path / "plain"), Settings(tokenizer_file)))
    run_job(Job((str(packed),), str(tmp_path / "engine"), Settings(tokenizer_file)), None, lambda: Unclosed(engine))
    for part in ("bin", "idx"):
        mine, other = (Path(f"{tmp_path}/{name}_text_document.{part}").read_bytes() for name in ("plain", "engine"))
        assert mine == other


def test_repeated_spans_are_the_same(engine, tmp_path):
    rng = np.random.default_rng(2)
    pool = [rng.integers(0, 300, 30) for _ in range(12)]
    prefix = write(tmp_path / "t", [np.concatenate([pool[k] for k in rng.integers(0, 12, 4)]) for _ in range(20)])
    whole = find_repeated_token_spans(TokenFile(prefix), 15)
    assert (
        find_repeated_token_spans(TokenFile(prefix), 15, engine, str(tmp_path / "parts"), 700) == whole
        and len(whole) > 10
    )


def test_repeated_bytes_are_the_same(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 12_000)
    source = tmp_path / "in.jsonl"
    texts = documents(60)
    source.write_text("".join(json.dumps({"text": a + b}) + "\n" for a, b in zip(texts, texts[::-1], strict=True)))
    results = []
    for number, runs in enumerate((LocalEngine(1), engine)):
        paths = [tmp_path / f"{number}.{name}" for name in ("kept", "gone")]
        with Corpus([str(source)], engine=runs, folder=str(tmp_path / f"{number}.parts")) as corpus:
            assert len(corpus.shards) > 3
            cuts = cut_repeated_text(corpus, 40, str(paths[0]), str(paths[1]), 5000)
        results.append([path.read_bytes() for path in paths])
    assert results[0] == results[1] and cuts.spans > 20


def test_a_task_that_always_kills_its_worker_is_named():
    with LocalEngine(2) as engine:
        with pytest.raises(ConfigError, match="killed 3 times"):
            list(engine.map(suicidal, [1, 2]))
        assert sorted(engine.map(double, [3, 4])) == [6, 8]


def test_unknown_engines_and_addresses_are_explained():
    with pytest.raises(ConfigError, match="choose one of local, spark, ray"):
        make_engine("dask")
    with pytest.raises(ConfigError, match="--engine-address"):
        make_engine("local", 2, "spark://here:7077")
    assert isinstance(make_engine(), LocalEngine)
