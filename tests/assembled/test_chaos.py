"""Faults by configuration, in runs started as a user starts them: each is found and named, and the losses stay what they were."""

import pytest

from tests.assembled.runs import Run, train

WORDS = ("train.steps=60", "train.eval_every=20", "checkpoint.every=10")
FAULTS = (  # one an attempt, by their steps
    "{kind: kill, phase: join, rank: 1}",
    "{kind: exception, phase: reduce, step: 12, rank: 1, attempts: 2}",
    "{kind: exit, phase: save, step: 15, rank: 0, attempts: 3}",
    "{kind: out_of_memory, phase: data, step: 25, rank: 1, attempts: 4}",
    "{kind: kill, phase: evaluate, step: 35, rank: 0, attempts: 5}",
    "{kind: exit, phase: end, rank: 1, attempts: 6}",
)


def losses(run: Run) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in run.records}


def test_a_run_sees_six_faults_through_and_ends_as_one_that_saw_none(tmp_path):
    for name in ("calm", "chaos"):
        (tmp_path / name).mkdir()
    calm = train(tmp_path / "calm", *WORDS, ranks=2).ended_well()
    chaos = f"resilience.chaos.faults=[{', '.join(FAULTS)}]"
    run = train(tmp_path / "chaos", *WORDS, chaos, "resilience.max_restarts=9", ranks=2).ended_well()
    lost = [(event["rank"], event["exit"], event["where"].split()[0]) for event in run.of("rank_lost")]
    assert [rank for rank, _, _ in lost] == [1, 1, 0, 1, 0, 1]
    assert [where for _, _, where in lost] == ["join", "reduce", "save", "data", "evaluate", "end"]
    assert lost[0][1] == "signal 9 (SIGKILL)" and lost[2][1] == "exit code 0"
    assert "ChaosError: an error on purpose" in run.of("rank_lost")[1]["error"]
    assert "MemoryError" in run.of("rank_lost")[3]["error"]
    assert losses(run) == losses(calm)
    assert run.errors.count("chaos: rank ") == len(FAULTS)


def test_a_rank_whose_weights_are_wrong_is_named_and_the_losses_stay_those_of_an_undisturbed_run(tmp_path):
    words = ("train.steps=40", "checkpoint.every=20", "guard.replica_check_every=8", "guard.snapshot_lags=[4,16]")
    for name in ("calm", "wrong"):
        (tmp_path / name).mkdir()
    calm = train(tmp_path / "calm", *words, ranks=3).ended_well()
    flip = [f"guard.provoke.{word}" for word in ("kind=bit_flip", "step=20", "rank=1", "bit=3")]
    run = train(tmp_path / "wrong", *words, *flip, ranks=3).ended_well()
    assert [(event["step"], event["rank"], event["what"]) for event in run.of("sdc")] == [(24, 1, "weights")]
    assert losses(run) == losses(calm)
    assert "rank 1 had computed wrongly" in run.shown and "sdc" in run.report


def test_the_same_error_in_the_same_step_twice_is_not_tried_again(tmp_path):
    fault = "resilience.chaos.faults=[{kind: exception, phase: update, step: 12, rank: 1, attempts: 9}]"
    run = train(tmp_path, *WORDS, fault, ranks=2).ended_well(3)
    assert len(run.of("rank_lost")) == 2 and len(run.of("restart")) == 1
    assert "in update of step 12 for the second time: a restart does not help" in run.of("give_up")[0]["reason"]
    assert "give_up" in run.report


def test_a_run_goes_from_4_ranks_to_3_to_1_to_2_and_to_4_again_and_follows_the_loss_of_one(tmp_path):
    lost = (
        "{kind: lose, step: 25, rank: 3, until: 220}",
        "{kind: lose, step: 45, rank: 1, until: 60}",
        "{kind: lose, step: 45, rank: 2, until: 220}",
    )
    batch = ("train.global_batch_size=12", "train.micro_batch_size=1")
    words = ("train.steps=400", "checkpoint.every=10", "optim.lr=1e-3", "optim.min_lr=1e-4", *batch)
    for name in ("one", "worlds"):
        (tmp_path / name).mkdir()
    one = train(tmp_path / "one", *words).ended_well()
    chaos = ("resilience.min_ranks=1", f"resilience.chaos.faults=[{', '.join(lost)}]")
    run = train(tmp_path / "worlds", *words, *chaos, ranks=4).ended_well()
    restarts = run.of("restart")
    assert [event["world_size"] for event in restarts] == [3, 1, 2, 4]
    assert [event["excluded"] for event in restarts] == [[3], [3, 1, 2], [3, 2], []]
    assert [event["lost_steps"] for event in restarts[2:]] == [0, 0]  # they grow at a save
    assert "place 1 of this machine works again: starting 2 ranks" in run.errors
    assert losses(run) == pytest.approx(losses(one), rel=1e-6)


def test_a_spare_takes_the_place_of_one_that_does_not_come_back(tmp_path):
    fault = "resilience.chaos.faults=[{kind: lose, step: 25, rank: 0}]"
    run = train(tmp_path, *WORDS, fault, "resilience.spares=1", ranks=2).ended_well()
    assert [(event["world_size"], event["excluded"]) for event in run.of("restart")] == [(2, [0])]
    assert "starting 2 ranks on a spare" in run.errors


def test_without_enough_ranks_the_run_gives_up(tmp_path):
    fault = "resilience.chaos.faults=[{kind: lose, step: 5, rank: 1}]"
    words = ("resilience.min_ranks=2", "resilience.max_restarts=1")
    run = train(tmp_path, *WORDS, fault, *words, ranks=2).ended_well(3)
    assert "rank 1 was killed by signal 9 (SIGKILL), after 1 restarts" in run.of("give_up")[0]["reason"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("resilience.chaos.faults=[{kind: meteor}]", "meteor"),
        ("resilience.chaos.faults=[{rank: 2}]", "the ranks are 0 to 1"),
        ("resilience.min_ranks=3", "resilience.min_ranks=3, but the run has 2 ranks"),
        ("resilience.chaos.mean_s=5", "without resilience.chaos.faults"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(tmp_path, word, said):
    run = train(tmp_path, *WORDS, word, ranks=2).ended_well(2)
    assert said in run.errors and not run.folder.exists()
