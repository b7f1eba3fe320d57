"""Pictures of schedules and the command that draws them."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

import tools.plan
from megalm.pipeline import draw
from megalm.pipeline.schedule import KINDS, build_schedule
from megalm.pipeline.simulate import Costs, simulate
from tools.subcommands import run_tool


def picture(kind: str, ranks: int, m: int, costs: Costs | None = None, **options) -> list[str]:
    return draw.draw_text(simulate(build_schedule(kind, ranks, m), costs), **options).splitlines()


def test_the_picture_is_the_papers():
    assert picture("1f1b", 2, 3) == [
        "rank 0 F0 F1 ·  ·  B0─── F2 B1─── ·  B2───",
        "rank 1 ·  F0 B0─── F1 B1─── F2 B2─── ·  ·",
    ]
    assert picture("zb-h1", 2, 3) == [
        "rank 0 F0 F1 ·  I0 W0 F2 I1 W1 I2 W2",
        "rank 1 ·  F0 I0 F1 I1 W0 F2 I2 W1 W2",
    ]
    assert picture("zb-v", 2, 1, unicode=False) == [
        "rank 0 F0a .   .   F0b I0b W0b .   .   I0a W0a",
        "rank 1 .   F0a F0b .   .   I0b W0b I0a W0a .",
    ]


def test_width_cuts_lines_and_colour_adds_only_colour():
    cut = picture("1f1b", 4, 8, width=40)
    assert all(len(line) <= 40 and line.endswith("…") for line in cut)
    import re

    coloured = "\n".join(picture("zb-v", 4, 8, color=True))
    assert "\x1b[30;48;5;111mF0a" in coloured and coloured.count("\x1b[0m") > 8
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()
    assert [line.rstrip() for line in bare] == picture("zb-v", 4, 8)


def test_longer_passes_are_wider():
    wide = picture("1f1b", 1, 1, Costs(1, 2, 2))[0]
    assert wide == "rank 0 F0 B0─────────"


@pytest.mark.parametrize("kind", KINDS)
def test_svg_holds_every_pass_at_its_time(kind):
    s = simulate(build_schedule(kind, 3, 5), Costs(1, 1, 0.5))
    root = ElementTree.fromstring(draw.draw_svg(s))
    name = "{http://www.w3.org/2000/svg}"
    passes = [r for r in root.iter(f"{name}rect") if r.get("stroke")]
    assert len(passes) == sum(len(order) for order in s.schedule.computation)
    scale = float(passes[0].get("width")) / (s.timeline.ends[0][0] - s.timeline.starts[0][0])
    times = sorted(x for starts in s.timeline.starts for x in starts)
    drawn = sorted((float(r.get("x")) - 64) / scale for r in passes)
    assert drawn == pytest.approx(times, abs=1e-3)
    assert f"{s.bubble_fraction:.1%}" in root.find(f"{name}title").text


def test_command(tmp_path, capsys):
    file = tmp_path / "zb-v.svg"
    arguments = ["schedule", "--kind", "zb-v", "--stages", "4", "--microbatches", "8"]
    assert run_tool(tools.plan, [*arguments, "--svg", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "rank 3" in printed and "bubble 5.88%" in printed and "waits at most 0.00%" in printed
    assert file.read_text().startswith("<svg")
    assert run_tool(tools.plan, [*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["makespan"] == 51 and data["actions"][3][0] == "RA:0:0" and len(data["peak_activations"]) == 4


def test_command_compares_all_kinds(capsys):
    assert run_tool(tools.plan, ["schedule", "--kind", "all", "--stages", "4", "--microbatches", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    times = {line.split()[0]: float(line.split()[2]) for line in lines}
    assert times == {
        "gpipe": 33, "1f1b": 33, "interleaved": 28.5, "zb-h1": 27, "zb-v": 25.5, "dualpipe-v": 25.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "zb-v", "--chunks", "3"], "virtual_pipeline=3"),
        (["--stages", "0"], "pipeline=0"),
        (["--forward", "0"], "--forward=0"),
        (["--communication", "-1"], "--communication=-1"),
        (["--svg", "/does/not/exist.svg"], "cannot be written"),
    ],
)
def test_command_refuses_with_status_2(arguments, message, capsys):
    assert run_tool(tools.plan, ["schedule", *arguments]) == 2
    assert message in capsys.readouterr().err
