"""What the README says exists: its commands, targets, modules and models. Its paths: test_pages.py."""

import re
import shlex
from pathlib import Path

import pytest

from megalm.__main__ import main
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


TOOLS = [command for command in of("megalm ") if not command.startswith("megalm train")]


@pytest.mark.parametrize("tool", sorted({command.split()[1] for command in TOOLS}))
def test_tools_answer_help(tool, capsys):
    with pytest.raises(SystemExit) as ended:
        main([tool, "--help"])
    assert ended.value.code == 0 and f"usage: megalm {tool}" in capsys.readouterr().out


@pytest.mark.parametrize("command", TOOLS)
def test_subcommands_exist(command):
    tool, *rest = shlex.split(command)[1:]
    folder = ROOT / "tools" / tool
    if "run_tool" in (folder / "__main__.py").read_text() and rest and not (ROOT / rest[0]).exists():
        name = rest[0]
        assert any(folder.rglob(f"{name}.py")) or name.startswith(("runs/", "-")), command
