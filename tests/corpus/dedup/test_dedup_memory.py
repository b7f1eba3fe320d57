"""`--memory` bounds all processes of a deduplication together, whatever the input."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalm.corpus.dedup import near
from tests.texts import documents
from tools.bench.data.dedup_memory import measure_held
from tools.dedup.__main__ import main

psutil = pytest.importorskip("psutil")


def peak(command):
    """Megabytes of the tool and its workers, at most."""
    process = subprocess.Popen([sys.executable, "-m", "tools.dedup", *command], stdout=subprocess.DEVNULL)
    tool, most = psutil.Process(process.pid), 0
    while process.poll() is None:
        sizes = []
        for one in [tool, *tool.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has just ended
                sizes.append(measure_held(one))
        most = max(most, sum(sizes))
        time.sleep(0.02)
    assert process.returncode == 0
    return most / 1e6


@pytest.fixture
def many(tmp_path):
    """400,000 texts of two words, of which every third comes again: 168 bytes of signatures for 20 of text."""
    numbers = np.random.default_rng(1).integers(0, 250_000, 400_000).tolist()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"w{n} q{n % 7}"}) + "\n" for n in numbers))
    return tmp_path


@pytest.mark.parametrize("way", ["near", "exact"])
def test_the_memory_of_all_processes_stays_below_the_bound(many, way):
    outputs = ["--output", str(many / "kept"), "--removed", str(many / "gone")]
    assert peak([way, str(many / "in.jsonl"), *outputs, "--workers", "1", "--memory", "135"]) < 135


@pytest.mark.parametrize("way", ["near", "exact", "semantic", "substring"])
def test_the_bound_does_not_change_the_result(tmp_path, monkeypatch, way):
    texts = documents(300)
    rows = [*texts, *texts[50:150], *["the same again and again in all of these texts"] * 40]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    results = []
    for memory, cost in (("2000", 1), ("130", 4000)):
        monkeypatch.setattr(near, "PAIR_BYTES", 160 * cost)  # as if there were as many more
        monkeypatch.setattr(near, "HASH_BYTES", 72 * cost)
        paths = [str(tmp_path / f"{memory}.{part}") for part in ("kept", "gone")]
        more = ["--bytes", "60"] if way == "substring" else []
        command = [way, str(tmp_path / "in.jsonl"), "--output", paths[0], "--removed", paths[1], *more]
        assert main([*command, "--workers", "1", "--memory", memory]) == 0
        results.append([Path(path).read_bytes() for path in paths])
    assert results[0] == results[1] and results[0][1].count(b"\n") > 90


def test_too_little_memory_is_refused(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    assert main(["near", str(tmp_path / "in.jsonl"), "--workers", "4", "--memory", "100"]) == 2
    assert "--memory 100 is too little for 4 workers: give at least 630 (MB)" in capsys.readouterr().err
