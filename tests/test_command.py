"""The one command, `megalm`: its list, its tools, what it says to a word that it does not know."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.__main__ import find_tools, main

ROOT = Path(__file__).resolve().parent.parent


def test_help_lists_every_tool_with_a_sentence(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    tools = find_tools()
    assert {path.parent.name for path in (ROOT / "tools").glob("*/__main__.py")} == set(tools)
    assert all(text and f"  {text}" in shown for text in tools.values())


def test_help_needs_no_torch_and_little_time():
    code = "import megalm.__main__ as m, sys, time; m.main(['--help']); print('torch' in sys.modules, time.process_time() < 0.5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False True", done.stderr


def test_train_is_the_launcher(capsys):
    assert main(["train", "--help"]) == 0
    assert "+model=" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, expected",
    [
        (["tokenise"], "Did you mean 'tokenize'?"),
        (["+model=tiny"], "megalm train +model=tiny"),
        (["train.steps=3"], "megalm train train.steps=3"),
        (["fly"], "There are: train, "),
    ],
)
def test_an_unknown_command_is_answered_with_what_there_is(words, expected, capsys):
    assert main(words) == 2
    assert expected in capsys.readouterr().err


def test_a_tool_runs_by_its_name(capsys):
    assert main(["plan", "shape", "+model=tiny", "--json"]) == 0
    assert '"parameters"' in capsys.readouterr().out


def test_a_users_own_tools_neither_hide_ours_nor_are_hidden(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("MINE = True")
    code = "import tools, megalm.__main__ as m; print(tools.MINE, m.main(['plan', '--help']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=_environment()
    )
    assert "usage: megalm plan" in done.stdout and "Traceback" not in done.stderr, done.stderr
    code = "import megalm.__main__ as m; m.find_tools(); import tools; print(tools.MINE)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=_environment()
    )
    assert done.stdout.strip() == "True", done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
