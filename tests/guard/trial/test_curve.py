"""`megalm guard replay`: any log in, alarms out; what cannot be read is explained."""

import json
import re

import pytest

from megalm.guard.trial.curve import read_curve
from tests.guard.curves import healthy
from tools.guard.__main__ import main


@pytest.fixture
def curve(tmp_path):
    def write(values, name="curve.csv", column="loss", stride=1):
        path = tmp_path / name
        if name.endswith(".jsonl"):
            lines = [json.dumps({"step": i, column: v}) for i, v in enumerate(values)]
        else:
            lines = [f"step,{column}"] + [f"{i * stride},{v}" for i, v in enumerate(values)]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def replay(capsys, *arguments):
    status = main(["replay", *arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def shifted():
    values = healthy(900, 1)
    values[600] = float("nan")
    values[700:] += 0.8
    return values.tolist()


@pytest.mark.parametrize("name", ["curve.csv", "metrics.jsonl"])
def test_json_has_exactly_the_agreed_keys(curve, capsys, name):
    status, out, _ = replay(capsys, curve(shifted(), name), "--json")
    answer = json.loads(out)
    assert status == 0 and set(answer) == {"steps", "alarms"} and answer["steps"] == 900
    assert all(set(alarm) == {"step", "kind", "action", "z"} for alarm in answer["alarms"])
    assert {alarm["kind"] for alarm in answer["alarms"]} <= {"transient", "shift", "nonfinite"}
    assert {"step": 600, "kind": "nonfinite", "action": "skip", "z": None} in answer["alarms"]
    back = [alarm["step"] for alarm in answer["alarms"] if alarm["action"] == "rollback"]
    assert len(back) == 1 and 700 < back[0] < 720


def test_text_ends_with_a_summary(curve, capsys):
    status, out, _ = replay(capsys, curve(shifted()))
    assert status == 0 and "nonfinite" in out and "1 rollbacks" in out.splitlines()[-1]


def test_a_page_shows_the_alarms(curve, capsys, tmp_path):
    status, _, _ = replay(capsys, curve(shifted()), "--html", str(tmp_path / "page.html"), "--json")
    page = (tmp_path / "page.html").read_text()
    assert (
        status == 0 and page.count("<svg") == 1 and ">shift: rollback</text>" in page and "<td>nonfinite</td>" in page
    )
    status, _, err = replay(capsys, curve(shifted()), "--html", str(tmp_path / "none" / "page.html"))
    assert status == 2 and "cannot be written" in err


@pytest.mark.parametrize("name", ["Step", "ITERATION"])
def test_the_steps_are_found_as_other_tools_write_them(tmp_path, capsys, name):
    path = tmp_path / "exported.csv"
    path.write_text(
        f"Wall time,{name},Value\n" + "".join(f"{i / 7},{100 * i},{3.0}\n" for i in range(50)) + "9,5000,nan\n"
    )
    status, out, _ = replay(capsys, str(path), "--column", "Value", "--json")
    assert status == 0 and [alarm["step"] for alarm in json.loads(out)["alarms"]] == [5000]


def test_another_column_and_every_hundredth_step(curve, capsys):
    values = healthy(400, 2, noise=0.01)
    values[300:308] *= 2
    status, out, _ = replay(capsys, curve(values, column="lm_loss", stride=100), "--column", "lm_loss", "--json")
    back = [alarm["step"] for alarm in json.loads(out)["alarms"] if alarm["action"] == "rollback"]
    assert status == 0 and back == [30200]


def test_a_missing_column_lists_those_that_are_there(curve, capsys):
    status, out, err = replay(capsys, curve([1.0, 2.0]), "--column", "lss")
    assert status == 2 and out == "" and "step, loss" in err and "'lss'" in err


@pytest.mark.parametrize(
    "text, says", [("", "empty"), ("step,loss\n1,two\n", "'two'"), ("step,loss\n1,\n", "no value")]
)
def test_other_bad_files_are_explained(tmp_path, capsys, text, says):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    status, _, err = replay(capsys, str(path))
    if says == "no value":  # a lone empty cell is a column that was never logged
        assert status == 2 and says in err
    else:
        assert status == 2 and says in err and "Traceback" not in err
    assert replay(capsys, str(tmp_path / "none.csv"))[0] == 2


def test_empty_cells_are_gaps_in_a_sparse_column_and_nan_in_a_full_one(tmp_path, capsys):
    path = tmp_path / "gaps.csv"
    values = healthy(300, 3)
    path.write_text("step,loss\n" + "".join(f"{i},{v if i % 2 else ''}\n" for i, v in enumerate(values)))
    assert json.loads(replay(capsys, str(path), "--json")[1])["steps"] == 150
    path.write_text("step,loss\n" + "".join(f"{i},{v if i != 200 else ''}\n" for i, v in enumerate(values)))
    answer = json.loads(replay(capsys, str(path), "--json")[1])
    assert answer["steps"] == 300 and [a["step"] for a in answer["alarms"] if a["kind"] == "nonfinite"] == [200]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_cells_are_parted_as_spreadsheets_do(tmp_path, capsys, mark):
    path = tmp_path / "curve.txt"
    path.write_text(f"step{mark}loss\n" + "".join(f"{i}{mark}2.5\n" for i in range(40)))
    status, out, _ = replay(capsys, str(path), "--json")
    assert status == 0 and json.loads(out) == {"steps": 40, "alarms": []}
    path.write_text(f"step{mark}loss\n")
    status, _, err = replay(capsys, str(path))
    assert status == 2 and "has the columns step, loss, and no row below them" in err


def rows(steps, value=lambda place: 2.5):
    return "".join(json.dumps({"step": step, "loss": value(place)}) + "\n" for place, step in enumerate(steps))


def test_of_a_step_made_twice_the_last_counts(tmp_path, capsys):
    """A run of 75 steps that went back from 50 to 24: 101 lines."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(rows([*range(1, 51), *range(25, 76)], lambda place: 9.0 if 40 <= place < 50 else 2.5))
    curve = read_curve(path)
    assert curve.steps == list(range(1, 76)) and set(curve.values) == {2.5} and curve.stride == 1
    (left,) = curve.abandoned
    assert [step for step, _ in left] == list(range(25, 51)) and left[-1] == (50, 9.0)
    status, out, _ = replay(capsys, str(path), "--html", str(tmp_path / "page.html"))
    assert status == 0 and out.splitlines()[-1].startswith("75 steps (26 more were made and gone back on): 0 alarms")
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="pale"') == 1 and "<dt>steps</dt><dd>75</dd>" in page
    drawn = re.findall(r'<polyline points="([^"]*)"', page)
    assert len(drawn) == 2
    for places in ([float(point.split(",")[0]) for point in line.split()] for line in drawn):
        assert places == sorted(places), "no line runs backwards"


def test_a_log_with_its_newest_row_first_is_turned_round(tmp_path):
    path = tmp_path / "exported.csv"
    path.write_text("step,loss\n" + "".join(f"{step},{step}.5\n" for step in range(40, 0, -1)))
    curve = read_curve(path)
    assert curve.steps == list(range(1, 41)) and curve.values[0] == 1.5 and curve.abandoned == []


GOOD = rows(range(1, 41)).encode()
TABLE = b"step,loss,lr\n" + b"".join(b"%d,2.5,0.001\n" % step for step in range(1, 41))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (GOOD + b'{"step": 41, "lo', 40),
        (GOOD[:200] + GOOD[230:], 38),
        (GOOD + b"\0" * 512, 40),
        (b"\0" * 64 + b"\n" + GOOD, 40),
        (GOOD + '{"step": 41, "phase": "é'.encode()[:-1], 40),
        (GOOD + b'{"step": 41, "loss": "nan"}\n{"step": 42, "loss": NaN}\n', 42),
        (TABLE + b"41,2", 40),
        (TABLE + b"41,2.5,0.0", 41),
        (TABLE + b"\0" * 512, 40),
        (TABLE + '41,2.5,"é'.encode()[:-1], 41),
        (b"\xef\xbb\xbf" + TABLE, 40),
    ],
)
def test_what_a_crash_left_of_a_log_is_read(tmp_path, capsys, text, steps):
    path = tmp_path / "log"
    path.write_bytes(text)
    status, out, err = replay(capsys, str(path), "--json")
    assert status == 0 and json.loads(out)["steps"] == steps, err


@pytest.mark.parametrize("text", [b"\0" * 100, b"\x80\x81\x82", b'{"step": 1, "lo', b"{\n{\n"])
def test_what_holds_no_curve_is_refused(tmp_path, capsys, text):
    path = tmp_path / "log"
    path.write_bytes(text)
    status, out, err = replay(capsys, str(path))
    assert status == 2 and out == "" and str(path) in err and "Traceback" not in err
