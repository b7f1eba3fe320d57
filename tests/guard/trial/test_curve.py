"""`python -m tools.guard replay`: any log in, alarms out; what cannot be read is explained."""

import json

import pytest

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
