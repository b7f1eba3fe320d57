import json

import pytest

from megalm.journal.life import tell_life
from tools import inspect
from tools.subcommands import run_tool

PHASES = {"detect": 0.1, "stop": 0.2, "wait": 0.0, "start": 0.5, "join": 0.1, "load": 0.1}


def steps(first: int, last: int) -> list[dict]:
    return [
        {"step": step, "loss": 5.0 - step / 100, "step_time_s": 0.5, "attempt": 0} for step in range(first, last + 1)
    ]


def event(kind: str, step: int, **fields) -> dict:
    return {"time": 1.7e9 + step, "step": step, "kind": kind, **fields}


STRUCK = [
    event("start", 0),
    event("checkpoint", 10),
    event("rank_lost", 14, rank=1, exit="signal 9 (SIGKILL)", where="backward of step 15"),
    event("start", 10),
    event("restart", 10, attempt=1, world_size=2, lost_steps=4, seconds=1.0, phases=PHASES),
    event("checkpoint", 20),
]


def test_a_restart_costs_its_phases_and_the_steps_that_are_made_again():
    life = tell_life(STRUCK, steps(1, 14) + steps(11, 20))
    assert (life.step, life.durable, life.starts, life.restarts, life.lost_steps) == (20, 20, 1, 1, 4)
    assert life.badput_s == {**PHASES, "redo": 2.0}
    assert life.trained_s == pytest.approx(10.0) and life.goodput == pytest.approx(10 / 13)
    assert life.ended is None


def test_an_undisturbed_run_has_kept_all_of_its_time():
    life = tell_life(STRUCK[:2], steps(1, 10))
    assert life.goodput == 1.0 and life.badput_s == {} and life.restarts == 0


def test_a_run_that_never_made_a_step_has_no_goodput():
    life = tell_life(STRUCK[:1], [])
    assert (life.step, life.loss, life.goodput, life.durable) == (0, None, None, None)


def test_who_gave_up_is_said_to_until_somebody_starts_it_again():
    gave_up = [*STRUCK, event("give_up", 20, reason="no", rank=0)]
    assert tell_life(gave_up, steps(1, 20)).ended == "gave up"
    assert tell_life([*gave_up, event("start", 20)], steps(1, 20)).ended is None


def test_the_tool_tells_it_in_one_screen(tmp_path, capsys):
    for name, rows in (("events", STRUCK), ("metrics", steps(1, 14) + steps(11, 20))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_tool(inspect, ["run", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "step 20, loss 4.8000, 0.5 s a step; newest checkpoint: step 20" in shown
    assert "started 1 time, its ranks 1 times more; 4 steps made again" in shown
    assert "goodput 76.9%; seconds lost: detect 0.1" in shown and "redo 2.0" in shown
    assert "rank 1, signal 9 (SIGKILL), in backward of step 15" in shown
    assert run_tool(inspect, ["run", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["restarts"] == 1


def test_another_folder_is_refused(tmp_path, capsys):
    assert run_tool(inspect, ["run", str(tmp_path)]) == 2
    assert "no run's folder" in capsys.readouterr().err
