"""An interrupted deduplication goes on from what is done, and gives the same bytes."""

import json
import os
import signal

import numpy as np
import pytest

import tools.dedup
from megalm.corpus import documents as documents_module
from megalm.corpus.dedup import stages as stages_module
from tests.data.test_loader import write
from tests.texts import documents
from tools.dedup.__main__ import main
from tools.subcommands import run_tool


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SMALLEST_PIECE", 9000)
    path = tmp_path / "in.jsonl"
    texts = documents(90)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[20:50]]))
    return path


def arguments(kind, source, tmp_path):
    target = [
        str(source),
        "--output",
        str(tmp_path / "kept.jsonl"),
        "--removed",
        str(tmp_path / "gone.jsonl"),
        "--workers",
        "1",
    ]
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(6)))
    more = {"substring": ["--bytes", "60"], "against": ["--evaluation", str(evaluation), "--words", "6"]}
    return [kind, *target, *more.get(kind, [])]


def results(tmp_path):
    return [(tmp_path / name).read_bytes() for name in ("kept.jsonl", "gone.jsonl")]


def killed(command, after):
    """Runs the command in a process that kills itself when so many tasks are done; whether it came so far."""
    child = os.fork()
    if child == 0:
        done = 0
        real = stages_module._call

        def call(task):
            nonlocal done
            if done == after:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return real(task)

        stages_module._call = call
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            run_tool(tools.dedup, command)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", ["near", "exact", "semantic", "against", "substring"])
def test_a_killed_run_goes_on(kind, source, tmp_path, monkeypatch, capsys):
    command = arguments(kind, source, tmp_path)
    assert run_tool(tools.dedup, command) == 0
    whole = results(tmp_path)
    assert all(whole)
    for name in ("kept.jsonl", "gone.jsonl"):
        (tmp_path / name).unlink()
    for after in (2, 3, 1, 4):  # four runs, each from where the last one was killed
        assert killed(command, after)
    assert (tmp_path / "kept.jsonl.parts" / "results").exists()
    with open(tmp_path / "kept.jsonl.parts" / "results", "a") as file:
        file.write('["torn')
    done, real = [], stages_module._call
    monkeypatch.setattr(stages_module, "_call", lambda task: done.append(1) or real(task))
    capsys.readouterr()
    assert run_tool(tools.dedup, command) == 0
    assert "going on with an interrupted run" in capsys.readouterr().err
    assert results(tmp_path) == whole and not (tmp_path / "kept.jsonl.parts").exists()
    resumed = len(done)
    assert run_tool(tools.dedup, command) == 0
    assert len(done) - resumed == resumed + 10


def test_other_arguments_and_another_input_begin_anew(source, tmp_path, capsys):
    command = arguments("near", source, tmp_path)
    for change in (
        lambda: command.extend(["--threshold", "0.7"]),
        lambda: source.write_text(source.read_text() + '{"text": "more"}\n'),
    ):
        assert killed(command, 3)
        change()
        assert run_tool(tools.dedup, command) == 0
        assert "beginning from the start" in capsys.readouterr().err


def test_an_interruption_from_the_keyboard_says_how_to_go_on(source, tmp_path, monkeypatch, capsys):
    command = arguments("exact", source, tmp_path)
    real = stages_module._call

    def call(task):
        if task.number == 2:
            raise KeyboardInterrupt
        return real(task)

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "_call", call)
        assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "kept.jsonl.parts").exists() and not (tmp_path / "kept.jsonl").exists()
    assert run_tool(tools.dedup, command) == 0 and not (tmp_path / "kept.jsonl.parts").exists()


def test_what_is_wrong_from_the_start_leaves_nothing(source, tmp_path, capsys):
    assert run_tool(tools.dedup, [*arguments("near", source, tmp_path), "--threshold", "2"]) == 2
    assert "--threshold" in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["evaluation.jsonl", "in.jsonl"]


def test_repeated_tokens_go_on(tmp_path, capsys):
    rng = np.random.default_rng(2)
    pool = [rng.integers(0, 300, 30) for _ in range(12)]
    prefix = write(tmp_path / "t", [np.concatenate([pool[k] for k in rng.integers(0, 12, 4)]) for _ in range(20)])
    command = ["substring", prefix, "--length", "15", "--output", str(tmp_path / "u"), "--workers", "1"]
    assert run_tool(tools.dedup, command) == 0
    whole = (tmp_path / "u.bin").read_bytes()
    (tmp_path / "u.bin").unlink()
    assert killed(command, 1) and killed(command, 1)
    assert run_tool(tools.dedup, command) == 0 and (tmp_path / "u.bin").read_bytes() == whole
    assert "going on" in capsys.readouterr().err and not (tmp_path / "u.parts").exists()
