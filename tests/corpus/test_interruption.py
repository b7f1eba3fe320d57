"""Signals to the data tools: they return at once, leave nothing but what is done, and nobody behind."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.texts import documents
from tools.tokenize.__main__ import main

psutil = pytest.importorskip("psutil")


@pytest.fixture
def command(tmp_path, tokenizer_file):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(200))
    (tmp_path / "in.jsonl").write_text(lines * (60_000_000 // len(lines)))
    inputs = [str(tmp_path / "in.jsonl"), "--tokenizer", tokenizer_file, "--backend", "tokenizers"]  # slow enough
    return [*inputs, "--output", str(tmp_path / "o"), "--workers", "2"]


@pytest.fixture
def running(command, tmp_path):
    """The tool, as soon as it has done a part of the work, and its workers."""
    # What runs in the background of a shell inherits that interrupts are ignored, and so would the tool.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    arguments = [sys.executable, "-m", "tools.tokenize", *command]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard)
    while process.poll() is None and not list(tmp_path.glob("o.parts/*.json")):
        time.sleep(0.02)
    assert process.poll() is None
    yield process, psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.stderr.close()


def gone(workers):
    return not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.parametrize("number, group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_the_tool_returns_at_once_and_says_how_to_go_on(running, command, tmp_path, number, group):
    process, workers = running
    assert len(workers) >= 2
    start = time.monotonic()
    os.killpg(process.pid, number) if group else process.send_signal(number)
    message = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and time.monotonic() - start < 5  # 0.2 s where nothing else runs
    assert "the same command goes on" in message and "Traceback" not in message and gone(workers)
    assert not list(tmp_path.glob("o.parts/*.partial")) and not list(tmp_path.glob("o_text_document*"))


def test_workers_end_with_the_tool_that_was_killed(running):
    process, workers = running
    process.kill()
    assert gone(workers)


def test_two_runs_do_not_write_one_output(running, command, capsys):
    assert main(command) == 2
    assert "another run is at work on this output" in capsys.readouterr().err
