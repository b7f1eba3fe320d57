"""docs/pipeline.md shows what the commands really print."""

import re
import shlex
from pathlib import Path

import tools.plan
from tools.subcommands import run_tool

ROOT = Path(__file__).parents[2]


def test_the_page_shows_what_the_commands_print(capsys):
    page = (ROOT / "docs/pipeline.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n\$ megalm plan (.*?)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    for command, expected in blocks:
        assert run_tool(tools.plan, [*shlex.split(command), "--color", "never"]) == 0
        assert capsys.readouterr().out.rstrip() == expected.rstrip(), command


def test_the_picture_is_up_to_date(tmp_path, capsys):
    file = tmp_path / "zb-v.svg"
    arguments = ["schedule", "--kind", "zb-v", "--stages", "4", "--microbatches", "8", "--svg", str(file)]
    assert run_tool(tools.plan, arguments) == 0
    capsys.readouterr()
    assert file.read_text() == (ROOT / "docs/images/zb-v.svg").read_text()
