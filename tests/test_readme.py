"""What the README says exists: its commands, targets, modules and models. Its paths: test_pages.py."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.config.compose import compose_config
from megalm.plan.search import expand_auto

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in COMMANDS if line and not line.startswith("#")]


def of(prefix: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(prefix)]


def test_the_two_commands_stand_first():
    assert COMMANDS[:2] == ["make train", "make test"] or COMMANDS[1:3] == ["make train", "make test"]


@pytest.mark.parametrize("command", of("make "))
def test_make_targets_exist(command):
    target = next(word for word in shlex.split(command)[1:] if "=" not in word)
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command


@pytest.mark.parametrize("command", [c for c in of("python -m megalm.launch") if "+model=" in c])
def test_launch_commands_compose(command):
    compose_config(expand_auto(shlex.split(command)[3:]))


@pytest.mark.parametrize("command", sorted({" ".join(c.split()[:3]) for c in of("python -m tools.")}))
def test_tools_answer_help(command):
    module = command.split()[2]
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert shown.returncode == 0 and "usage" in shown.stdout.lower(), shown.stderr


@pytest.mark.parametrize("command", of("python -m tools."))
def test_subcommands_exist(command):
    module, *rest = shlex.split(command)[2:]
    folder = ROOT / module.replace(".", "/")
    if "run_tool" in (folder / "__main__.py").read_text() and rest and not (ROOT / rest[0]).exists():
        name = rest[0]
        assert any(folder.rglob(f"{name}.py")) or name.startswith(("runs/", "-")), command
