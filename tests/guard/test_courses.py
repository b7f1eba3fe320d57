"""What is left on disk by a run that went back: no stale checkpoint, no step counted twice, the data in its new order."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from megalm.checkpoint.commit import list_committed, parse_step
from megalm.config.writing import write_whole
from megalm.data.order import Source
from megalm.data.stream import Stream
from megalm.journal import EventLog, choose_course, describe_event
from megalm.observe.console import ConsoleHook
from megalm.observe.metrics import MetricsWriter
from megalm.observe.report import render
from megalm.observe.samples import find_samples_of_step
from tests.guard.runs import END, overrides, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("courses")
    rungs = "guard.rungs=[{action: skip}, {action: reseed, reset_moments: true}, {action: give_up}]"
    arguments = overrides(folder, "second_moment", rungs, "checkpoint.every=37", "checkpoint.keep=1", "run.name=reseed")
    writer = MetricsWriter(folder / "runs" / "reseed" / "metrics.jsonl")
    seen = {"counts": []}

    def look(trainer, record):
        seen["counts"].append((record["step"], trainer.optimizer.step_count))
        seen["steps"] = [parse_step(p) for p in list_committed(trainer.checkpoints.folder)]
        if trainer.attempt == 2 and "later" not in seen:
            seen["later"] = seen["steps"]

    writer_step = writer.on_step_end
    writer.on_step_end = lambda trainer, record: (writer_step(trainer, record), look(trainer, record))
    return train(arguments, writer), seen, arguments


def test_no_checkpoint_of_the_abandoned_course_is_left(run):
    outcome, seen, _ = run
    back = outcome.of("rollback")[0]
    assert back["to_step"] < 37 < back["step"]
    assert seen["later"] == [back["to_step"]], "the only good checkpoint was a later one: the state is saved first"


def test_the_last_course_is_what_counts(run):
    outcome, _, _ = run
    records = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    course = choose_course(records)
    kept, abandoned = course.steps, course.abandoned
    assert [r["step"] for r in kept] == list(range(1, END + 1)) and len(abandoned) == 2
    assert sum(map(len, abandoned)) + len(kept) == len(records)
    back = outcome.of("rollback")[0]["to_step"]
    assert [r["attempt"] for r in kept] == [0] * back + [2] * (END - back)
    page = render("run", records, outcome.events, {})
    assert page.count('class="pale"') >= 2 * len(abandoned) and f"back to step {back}" in page


def test_reseeding_changes_the_rest_of_the_data_and_the_moments(run):
    outcome, seen, _ = run
    (reseed,) = outcome.of("reseed")
    assert outcome.records[-1]["samples"] > END * 8
    assert dict(seen["counts"])[END] == END - reseed["to_step"], "the moments, and with them the count, started anew"


def test_the_samples_of_a_step_after_reseeding_are_those_it_was_made_from(run, monkeypatch):
    """The newest checkpoint knows of the other order, and so do the events."""
    from megalm.config.compose import compose_config
    from megalm.config.saved import write_config_yaml
    from megalm.observe import samples

    outcome, _, arguments = run
    write_whole(outcome.folder / "config.yaml", write_config_yaml(compose_config(arguments)))
    (reseed,) = outcome.of("reseed")
    events = outcome.folder / "events.jsonl"
    text = events.read_text()
    found = [s["sample"] for s in find_samples_of_step(outcome.folder, END)]
    monkeypatch.setattr(samples, "_saved", lambda run: None)
    by_events = [s["sample"] for s in find_samples_of_step(outcome.folder, END)]
    events.write_text("".join(line for line in text.splitlines(True) if '"kind": "reseed"' not in line))
    unordered = [s["sample"] for s in find_samples_of_step(outcome.folder, END)]
    events.write_text(text)
    assert found == by_events != unordered


@pytest.mark.parametrize("window", [0, 8])
def test_a_reseeded_stream_gives_each_sample_once_an_epoch(window):
    sources = [Source("a", 97, 2.0), Source("b", 41, 1.0)]
    plain, stream = Stream(sources, 5, window=window), Stream(sources, 5, window=window)
    stream.reseed(30, 1)
    stream.reseed(61, 2)
    again = Stream(sources, 5, window=window)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())), 61)
    positions = np.arange(700)
    one, two, three = plain.samples(positions), stream.samples(positions), again.samples(positions)
    assert (two.index == three.index).all() and (one.source == two.source).all() and (one.epoch == two.epoch).all()
    assert (one.index[:30] == two.index[:30]).all()
    assert (one.index[30:] != two.index[30:]).mean() > 0.8
    for number, source in enumerate(sources):
        for epoch in range(2):
            taken = two.index[(two.source == number) & (two.epoch == epoch)]
            assert sorted(taken) == list(range(source.samples))


def test_a_mark_says_what_was_found_and_done():
    event = {
        "kind": "rollback",
        "step": 40,
        "onset": 38,
        "cause": "weights",
        "to_step": 32,
        "samples": [64, 96],
        "lr_scale": 0.7,
    }
    assert describe_event(event) == (
        "rollback at step 40, onset 38, cause weights, back to step 32, samples 64 to 95 skipped, learning rate x 0.7"
    )


def test_the_console_tells_what_the_guard_saw_and_did(tmp_path):
    text = io.StringIO()
    console = ConsoleHook(Console(file=text, width=200), 10)
    log = EventLog(tmp_path / "events.jsonl")
    log.listeners.append(console.on_event)
    log.write("start", step=0)
    log.write("resume", step=5)
    log.write("spike", step=9, onset=9, cause="data", loss=8.0, expected=4.0, why=["loss"], samples=[8, 16])
    log.write("recovered", step=4, seconds=0.0123)
    log.close()
    assert text.getvalue().splitlines() == [
        "spike at step 9, onset 9, cause data, loss 8.0000 where 4.0000 was expected, out of line: loss",
        "recovered at step 4, in 0.0123 s",
    ]
