"""Which samples a step was made from: after rollbacks, with what the guard left out."""

import json

import numpy as np
import pytest

from megalm.config import ConfigError
from megalm.config.attempts import keep_attempt
from megalm.config.compose import compose_config
from megalm.config.phases import PhaseConfig
from megalm.config.saved import write_config_yaml
from megalm.data.loader import Loader
from megalm.data.phases import make_single_phase
from megalm.data.stream import take_back
from megalm.data.tokens import TokenWriter
from megalm.observe.samples import find_positions_of_step, find_samples_of_step, look_at_step
from megalm.parallel.mesh import Axis

FLAT = make_single_phase({"a": 1.0}, 16, 4)


@pytest.fixture
def run(tmp_path):
    # Steps 1 to 5 of batches of 4; at step 5 back to step 2, leaving out positions 10 to 18.
    made = [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (3, 20), (4, 24)]
    records = [{"step": step, "samples": samples, "loss": 1.0} for step, samples in made]
    decision = {"action": "rollback", "step": 5}
    events = [
        {"kind": "skip", "step": 4, "samples": [12, 16], "decision": {"action": "skip", "step": 4}},
        {"kind": "rollback", "step": 5, "to_step": 2, "samples": [10, 18], "decision": decision},
    ]
    return records, events


@pytest.mark.parametrize(
    "step, expected", [(1, [0, 1, 2, 3]), (2, [4, 5, 6, 7]), (3, [8, 9, 18, 19]), (4, [20, 21, 22, 23])]
)
def test_positions_are_those_of_the_last_time_the_step_was_made(run, step, expected):
    positions, recorded = find_positions_of_step(*run, step, FLAT)
    assert recorded and positions.tolist() == expected


def test_a_step_to_come_takes_what_follows(run):
    records, events = run
    assert find_positions_of_step(records, events, 6, FLAT)[0].tolist() == [28, 29, 30, 31]
    assert find_positions_of_step([], events, 6, FLAT, (3, 20))[0].tolist() == [28, 29, 30, 31]
    assert find_positions_of_step([], [], 3, FLAT)[0].tolist() == [8, 9, 10, 11]
    late = {"kind": "skip", "samples": [25, 30], "decision": {"action": "skip_data", "step": 4}}
    positions, recorded = find_positions_of_step(records, [*events, late], 6, FLAT)
    assert not recorded and positions.tolist() == [33, 34, 35, 36]


def test_without_the_record_before_a_step_ends_where_its_own_says(run):
    records, events = run
    assert find_positions_of_step(records[5:], events, 3, FLAT)[0].tolist() == [8, 9, 18, 19]
    assert take_back(20, 6, [(1, 3), (10, 18), (30, 40)]).tolist() == [6, 7, 8, 9, 18, 19]
    assert take_back(20, 2, [(10, 18)]).tolist() == [18, 19] and take_back(15, 3, [(10, 18)]).tolist() == [7, 8, 9]


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    """A run whose phases warm up the sequence length and the batch, with what its loader gave out, and skips."""
    folder = tmp_path_factory.mktemp("warm")
    for name, start in (("a", 0), ("b", 30_000)):
        with TokenWriter(folder / name, np.int32) as writer:
            for at in range(start, start + 20_000, 50):
                writer.add_document(np.arange(at, at + 50))
    phases = [
        {"name": "short", "steps": 4, "seq_length": 4, "global_batch_size": 2, "mixture": {"a": 1.0}},
        {"name": "more", "steps": 3, "seq_length": 8, "global_batch_size": 6, "mixture": {"a": 0.5, "b": 0.5}},
        {"name": "full", "steps": 8, "global_batch_size": 10, "mixture": {"a": 0.25, "b": 0.75}},
    ]
    words = [f"data.train=[{folder / 'a'},{folder / 'b'}]", "data.holdout=0", "model.seq_length=16"]
    words += ["data.tokenizer=null", "model.vocab_size=60000", "train.global_batch_size=8", "train.micro_batch_size=2"]
    config = compose_config(["+model=tiny", *words])
    config.data.phases = [PhaseConfig(**phase) for phase in phases]
    (folder / "config.yaml").write_text(write_config_yaml(config))
    loader, given, records, events = Loader(config, Axis("data")), {}, [], []
    for step in range(1, 13):
        given[step] = [row.tolist() for batch in loader.next() for row in batch.tokens]
        records.append({"step": step, "samples": loader.samples_consumed})
        if step in (2, 5, 8):  # one skip inside a phase, one over its end
            first = loader.samples_consumed + 3
            samples, decision = [first, first + (5 if step == 2 else 20)], {"action": "skip_data", "step": step}
            events.append({"kind": "skip", "step": step, "samples": samples, "decision": decision})
            loader.skip(*samples)
    for name, lines in (("metrics", records), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given |= {step: [row.tolist() for batch in loader.next() for row in batch.tokens] for step in (13, 14, 15)}
    loader.close()
    return folder, given


@pytest.mark.parametrize("step", range(1, 16))
def test_under_phases_the_samples_are_those_that_the_loader_gave(warmed, step):
    folder, given = warmed
    found = look_at_step(folder, step)
    assert found["recorded"] == (step <= 12)
    assert [[int(word) for word in row["text"].split()] for row in found["samples"]] == given[step]
    if step <= 12:
        assert [row["text"] for row in find_samples_of_step(folder, step)] == [row["text"] for row in found["samples"]]


def test_a_step_that_was_not_made_is_refused_with_those_that_were(warmed):
    with pytest.raises(ConfigError, match="steps 1 to 12"):
        find_samples_of_step(warmed[0], 14)
    with pytest.raises(ConfigError, match="count from 1"):
        look_at_step(warmed[0], 0)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A run that goes on after step 4 with another seed and batch, and after step 7 with a source more, in files that were
    moved; with what its loader gave out."""
    folder = tmp_path_factory.mktemp("changed")
    for name, start in (("a", 0), ("b", 30_000)):
        with TokenWriter(folder / name, np.int32) as writer:
            for at in range(start, start + 20_000, 50):
                writer.add_document(np.arange(at, at + 50))
    words = ["data.holdout=0", "model.seq_length=16", "data.tokenizer=null", "model.vocab_size=60000", "+model=tiny"]
    words.append("train.micro_batch_size=2")
    (folder / "moved").mkdir()
    attempts = [
        (1, 4, [f"data.train=[{folder}/a]", "train.global_batch_size=8", "train.seed=1"]),
        (5, 7, [f"data.train=[{folder}/a]", "train.global_batch_size=6", "train.seed=2"]),
        (8, 10, [f"data.train=[{folder}/moved/a,{folder}/moved/b]", "train.global_batch_size=6", "train.seed=2"]),
    ]
    given, records, state = {}, [], None
    for first, last, settings in attempts:
        if first == 8:
            for file in (*folder.glob("a.*"), *folder.glob("b.*")):
                file.rename(folder / "moved" / file.name)
        config = compose_config([*words, *settings])
        keep_attempt(folder, write_config_yaml(config), first)
        loader = Loader(config, Axis("data"))
        if state is not None:
            loader.load_state_dict(state)
        for step in range(first, last + 1):
            given[step] = [row.tolist() for batch in loader.next() for row in batch.tokens]
            records.append({"step": step, "samples": loader.samples_consumed})
        state = loader.state_dict()
        loader.close()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return folder, given, {"step": 10, "loader": state}


@pytest.mark.parametrize(
    ("step", "saved"),
    [
        *((step, True) for step in range(1, 11)),
        *((step, False) for step in range(1, 8)),
    ],  # the mixture is known from there
)
def test_old_steps_are_told_with_the_settings_that_made_them(changed, step, saved, monkeypatch):
    folder, given, state = changed
    monkeypatch.setattr("megalm.observe.samples._saved", lambda place: state if saved else None)
    found = look_at_step(folder, step)
    assert found["recorded"]
    assert [[int(word) for word in row["text"].split()] for row in found["samples"]] == given[step]
