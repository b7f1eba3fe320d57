"""What a model programs, run: what passes, and what is contained and said."""

import json
import os
import threading

import pytest

from megalm.__main__ import main
from megalm.config.errors import ConfigError
from megalm.evaluate import confined, sandbox
from megalm.evaluate.measure import evaluate_task
from megalm.evaluate.protocols import PROTOCOLS
from megalm.evaluate.sandbox import run_program
from megalm.evaluate.tasks.rows import make_item
from megalm.evaluate.tasks.suite import read_suite
from megalm.evaluate.written import MARKERS, Code, complete_program
from tests.evaluate.models import make_model

pytestmark = pytest.mark.skipif(confined.find_machine() is None, reason="no seccomp on this machine")

LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([3, 1]) == [1, 3]",
        "import threading\nfound = []\nt = threading.Thread(target=lambda: found.append(1))\nt.start(); t.join()\nassert found",
        "import collections, datetime, decimal, hashlib, heapq, itertools, json, math, random, re, string, typing\n"
        "assert hashlib.md5(b'').hexdigest() and math.pi",
    ],
    ids=["plain", "thread", "libraries"],
)
def test_a_program_passes(program):
    assert run_program(program).passed


STOPPED = {
    "wrong": ("assert 1 + 1 == 3", r"AssertionError.*line 1"),
    "computes for ever": ("while True: pass", "more than 1 s of processor time"),
    "ignores its limit": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "more than 1 s of processor time",
    ),
    "sleeps": ("import time\ntime.sleep(100)", "did not end within 4 s"),
    "forks": ("import os\nos.fork()", "may start no process"),
    "starts a program": ("import subprocess\nsubprocess.run(['true'])", "may start no process|write no file"),
    "becomes a program": ("import os\nos.execv('/bin/true', ['true'])", "may start no process"),
    "opens a socket": ("import socket\nsocket.socket()", "may open no socket"),
    "writes": ("open('x', 'w')", "may write no file"),
    "reads this machine's files": ("open('/etc/passwd').read()", "Permission denied"),
    "fills memory": ("x = bytearray(10**10)", "MemoryError"),
    "recurs": ("def f(): f()\nf()", "RecursionError"),
    "ends early": ("import os\nos._exit(0)", "ended itself before its tests"),
    "ends early, politely": ("import sys\nsys.exit(0)", "ended itself before its tests"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "ended by SIGSEGV"),
    "talks for ever": ("import os\nwhile True: os.write(3, b'x' * 4096)", "said more than it was asked"),
    "forges": ('import os\nos.write(3, b\'{"broken": 1, "token": "a"}\\n\')\nos._exit(0)', "ended itself"),
    "raises what cannot be told": (
        "class E(BaseException):\n    def __str__(self): raise E\nraise E()",
        "so did telling",
    ),
    "is no program": ("def f(:", "SyntaxError"),
}


@pytest.mark.parametrize("program,note", STOPPED.values(), ids=STOPPED)
def test_what_a_program_may_not_do_ends_it_and_is_said(program, note):
    import re

    ran = run_program(program, seconds=1)
    assert not ran.passed and re.search(note, ran.note), ran.note


@pytest.mark.parametrize(
    "call",
    [
        "fork()",
        "vfork()",
        "socket(2, 1, 0)",
        "socketpair(1, 1, 0, (ctypes.c_int * 2)())",
        "kill(1, 0)",
        "execv(b'/bin/true', None)",
        "open(b'x', 0o102, 0o600)",
        "mkdir(b'x', 0o700)",
        "unlink(b'/tmp/x')",
        "memfd_create(b'x', 0)",
        "setsid()",
        "unshare(0x10000000)",
    ],
)
def test_the_kernel_refuses_what_the_interpreter_does_not_see(call):
    assert run_program(f"{LIBC}assert libc.{call} == -1 and ctypes.get_errno() in (1, 13), ctypes.get_errno()").passed


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    for program in ("assert True", "import time; time.sleep(9)", "while True: pass"):
        run_program(program, seconds=1)
    assert os.listdir(tmp_path) == []


ROW = {
    "prompt": "import math\n\ndef area(r):\n",
    "entry_point": "area",
    "test": "def check(area):\n    assert abs(area(1) - 3.14159) < 1e-3\n",
    "canonical_solution": "    return math.pi * r * r\n",
}


@pytest.mark.parametrize(
    "text,passes",
    [
        ("    return math.pi * r * r", True),
        ("    return r", False),
        ("Here it is:\n```python\ndef area(r):\n    return math.pi * r ** 2\n```\nDone.", True),
        ("```\n    return math.pi * r * r\n```", True),
    ],
)
def test_a_completion_or_a_fenced_answer_becomes_a_program(text, passes):
    assert run_program(complete_program(make_item(ROW, "code", "here"), text)).passed is passes


def write_suite(folder):
    (folder / "own.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "entry_point": "other"}) + "\n")
    (folder / "own.yaml").write_text(
        "icl_tasks:\n  - {label: own, dataset_uri: own.jsonl, icl_task_type: code_evaluation, max_tokens: 8}\n"
    )
    return folder / "own.yaml"


def test_programs_are_judged_together_and_what_was_wrong_stays_with_the_item(tmp_path):
    (task,) = read_suite(str(write_suite(tmp_path))).tasks
    from megalm.evaluate.evaluation import Model

    model = Model.load(make_model(tmp_path / "model"))
    found = evaluate_task(
        task,
        PROTOCOLS["lm_eval"],
        model.scorer,
        model.tokenizer,
        write=lambda requests, task: ["    return math.pi * r * r"] * len(requests),
        markers={**MARKERS, "code": Code()},
    )
    assert found.figures["passed"].value == 0.5
    assert "NameError: name 'other' is not defined" in found.outcomes[1].note


def test_code_is_run_only_where_that_is_asked_for(tmp_path, capsys):
    words = ["evaluate", str(make_model(tmp_path / "model")), "--suite", str(write_suite(tmp_path))]
    words += ["--output", str(tmp_path / "out"), "--protocol", "lm_eval"]
    assert main(words) == 2
    assert "it runs the programs that the model writes" in capsys.readouterr().err
    assert main([*words, "--run-code", "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert task["figures"]["passed"]["value"] == 0.0
    assert all(json.loads(line)["note"] for line in (tmp_path / "out" / "own.jsonl").read_text().splitlines()[1:])


def test_a_machine_that_cannot_shut_programs_in_runs_none(monkeypatch):
    monkeypatch.setattr(confined.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="run only where Linux's seccomp shuts it in"):
        run_program("assert True")


def test_many_programs_run_at_once():
    found = []
    threads = [threading.Thread(target=lambda: found.append(run_program("assert True").passed)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


@pytest.mark.parametrize("name", [3, "not a name"])
def test_a_row_that_names_no_function_is_said(name):
    with pytest.raises(ConfigError, match="'entry_point' is"):
        make_item({**ROW, "entry_point": name}, "code", "here")
