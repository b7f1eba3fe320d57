"""The guard in the assembled product: what it does about damage, with everything attached that reads what it wrote.

Each run is asked the same (`told`): its events stand on the screen, in the report and in TensorBoard, its files are JSON
to the letter, and of the steps that were made again the report shows the first pale.
"""

import html

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalm.journal import choose_course, describe_event
from tests.assembled.runs import Run, train

QUICK = (
    "train.eval_every=0",
    "train.eval_sequences=4",
    "train.micro_batch_size=4",
    "train.log_every=10",
    "guard.detector.window=32",
    "guard.detector.min_window=16",
    "guard.snapshot_lags=[4,8,16]",
    "guard.skip_before=2",
    "guard.skip_after=2",
    "guard.probe_sequences=2",
    "checkpoint.every=10",
)
"""A guard that has its baseline after 16 steps and a clean snapshot soon after."""

DECISIONS = ("spike", "skip", "replay", "rollback", "verdict", "give_up")
LAST = 28
EARLY, LATE = 3, 22
"""Before the detector knows what is usual, and after."""

P = "guard.provoke."
GRADIENT = (P + "kind=gradient_scale", P + "factor=inf")
RATE = (P + "kind=lr_jump", P + "factor=1e20")
INFINITE_RATE = (P + "kind=lr_jump", P + "factor=inf")
WEIGHT = (P + "kind=bit_flip", P + "bit=30")


def told(run: Run) -> list[str]:
    """The kinds of the guard's events, after asserting that everybody was told of each, and that the files are whole."""
    decisions = [event for event in run.events if event["kind"] in DECISIONS]
    for event in decisions:
        words = describe_event(event)
        assert words in run.shown, words
        assert html.escape(words) in run.report, words
    course = choose_course(run.records)
    assert [record["step"] for record in course.steps] == list(range(1, course.steps[-1]["step"] + 1))
    assert ('class="pale"' in run.report) == bool(course.abandoned)
    scalars = EventAccumulator(str(run.folder / "tensorboard"))
    scalars.Reload()
    assert [each.step for each in scalars.Scalars("train/loss")] == [record["step"] for record in course.steps]
    for kind in {event["kind"] for event in decisions}:
        seen = {each.step for each in scalars.Scalars(f"events/{kind}")}
        assert seen == {event["step"] for event in decisions if event["kind"] == kind}, kind
    return [event["kind"] for event in decisions]


def damaged(folder, step: int, *words: str, ranks: int = 1) -> Run:
    return train(folder, *QUICK, f"train.steps={LAST}", f"{P}step={step}", *words, ranks=ranks)


CAUSES = {
    "bad_shard": "data",
    "permuted_tokens": "data",
    "repeated_token": "data",
    "large_gradients": "data",
    "bit_flip": "hardware",
    "learning_rate_jump": "weights",
    "zeroed_second_moment": "weights",
}


@pytest.mark.parametrize("recipe", CAUSES)
def test_every_recipe_is_met_and_told(tmp_path, recipe):
    run = damaged(tmp_path, 24, f"+experiment=spike/{recipe}", "optim.warmup_steps=4", "train.steps=34").ended_well()
    kinds = told(run)
    found = [event["cause"] for event in run.events if event["kind"] in ("spike", "verdict")]
    assert found[-1] == CAUSES[recipe] and run.records[-1]["step"] == 34
    assert ("replay" in kinds) == (CAUSES[recipe] != "data") and ("rollback" in kinds) == (found[-1] == "weights")
    assert min(event["step"] for event in run.of("spike")) == min(event["step"] for event in run.of("provoke")) == 24


def test_a_gradient_that_is_not_finite_is_refused_and_the_run_can_be_continued(tmp_path):
    run = damaged(tmp_path, LATE, *GRADIENT).ended_well()
    assert told(run) == ["spike", "skip"]
    (spike,) = run.of("spike")
    assert spike["step"] == LATE and spike["grad_norm"] == "nan" and spike["cause"] == "nonfinite"
    assert run.records[LATE - 1]["skipped"] == 1 and "gradient norm NaN" in run.report
    again = damaged(tmp_path, LATE, *GRADIENT, f"train.steps={LAST + 2}").ended_well()
    assert told_again(again, spike) and again.records[-1]["step"] == LAST + 2


def told_again(run: Run, event) -> bool:
    """A later start shows what an earlier one wrote: in its report, not on its screen."""
    return html.escape(describe_event(event)) in run.report and describe_event(event) not in run.shown


@pytest.mark.parametrize(
    ("guard", "damage", "step", "kinds", "status"),
    [
        ("default", GRADIENT, EARLY, ["spike", "skip"], 0),
        ("default", RATE, LATE, ["spike", "replay", "verdict"], 0),
        ("default", WEIGHT, EARLY, ["spike", "give_up"], 3),
        ("strict", INFINITE_RATE, EARLY, ["spike", "replay", "verdict"], 0),
        ("strict", WEIGHT, LATE, ["spike", "replay", "verdict"], 0),
        ("watch", GRADIENT, LATE, ["spike"] * 7, 1),
        ("watch", INFINITE_RATE, EARLY, ["spike"] * 8, 1),
        ("off", RATE, LATE, [], 1),
    ],
    ids=lambda value: str(value) if isinstance(value, str | int) else "",
)
def test_what_is_not_finite_is_met_as_the_guard_is_set(tmp_path, guard, damage, step, kinds, status):
    """watch and off go on with weights that are not finite; the engine itself then ends the run, and saves none of them."""
    run = damaged(tmp_path, step, *damage, f"guard={guard}").ended_well(status)
    assert told(run) == kinds
    assert run.records[-1]["step"] == (LAST if status == 0 else run.records[-1]["step"])
    if guard in ("watch", "off"):
        assert run.records[-1]["loss"] == "nan" and "is not saved" in run.errors
    elif status == 0:
        assert 0 < float(run.records[-1]["loss"]) < 4 and not run.of("unsaved")


@pytest.mark.parametrize(
    ("guard", "damage", "step", "kinds", "status"),
    [
        ("default", (*WEIGHT, P + "rank=1"), LATE, ["spike", "replay", "verdict"], 0),
        ("strict", GRADIENT, EARLY, ["spike", "skip"], 0),
        ("default", (*WEIGHT, P + "rank=1"), EARLY, ["spike", "give_up"], 3),
    ],
    ids=lambda value: str(value) if isinstance(value, str | int) else "",
)
def test_what_one_rank_of_two_meets_both_answer_alike(tmp_path, guard, damage, step, kinds, status):
    run = damaged(tmp_path, step, *damage, f"guard={guard}", "parallel.data=2", ranks=2).ended_well(status)
    assert told(run) == kinds and f"ended with status {status}" in run.log(0) and run.log(1).count("ended") == 1
    if "verdict" in kinds:
        assert run.of("verdict")[0]["ranks"] == [1] and "rank 1 had computed wrongly" in run.shown
