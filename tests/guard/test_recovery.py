"""Damage done on purpose to a small run: the right verdict, the right repair, nothing done without need."""

import pytest
import torch

from megalm.guard.probe import use_other_weights
from megalm.journal import describe_event
from megalm.train.hooks import Hook
from tests.guard.runs import END, STEP, Crash, overrides, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guard")


@pytest.fixture(scope="module")
def clean(folder):
    return train(overrides(folder, "clean"))


def test_a_healthy_run_is_left_alone_and_is_the_same_without_the_guard(folder, clean):
    assert clean.status == 0 and clean.kinds() == []
    without = train(overrides(folder, "clean", "guard=off", "run.name=off"))
    assert [r["loss"] for r in without.records] == [r["loss"] for r in clean.records]


def test_one_bad_batch_is_refused_and_nothing_rolled_back(folder, clean):
    run = train(overrides(folder, "one_bad_batch"))
    assert run.kinds() == ["skip"]
    skip = run.of("skip")[0]
    assert skip["step"] == STEP and skip["cause"] == "data"
    assert skip["samples"] == [(STEP - 1) * 8, STEP * 8]
    assert run.records[STEP - 1]["skipped"] == 1 and run.final < clean.final + 0.05


def test_a_bad_shard_is_refused_then_jumped_over(folder, clean):
    run = train(overrides(folder, "bad_shard"))
    assert set(run.kinds()) == {"skip"} and all(e["cause"] == "data" for e in run.of("spike"))
    jump = next(e for e in run.of("skip") if e["decision"]["action"] == "skip_data")
    assert jump["samples"][1] - jump["samples"][0] == 8 * 8
    assert run.records[-1]["samples"] > run.records[-1]["tokens"] / 32
    assert run.final < clean.final + 0.08


@pytest.mark.parametrize("kind, end", [("second_moment", END), ("learning_rate", 68)])
def test_true_damage_is_replayed_then_rolled_back_with_its_data(folder, clean, kind, end):
    run = train(overrides(folder, kind, steps=end))
    assert run.kinds() == ["replay", "rollback"]
    replay, rollback = run.of("replay")[0], run.of("rollback")[0]
    assert rollback["cause"] == "weights" and rollback["source"] == "memory"
    assert rollback["to_step"] == replay["to_step"] <= rollback["onset"] - 4
    first, last = rollback["samples"]
    assert first <= (STEP - 1) * 8 < last
    steps = [r["step"] for r in run.records]
    assert steps[-1] == end and steps.count(rollback["to_step"] + 1) == 3
    assert all(r["loss"] < 4 for r in run.records if r["step"] > rollback["step"])
    assert run.final < clean.final + 0.05


def test_a_bit_flip_is_found_to_be_the_hardware_and_costs_nothing(folder, clean):
    run = train(overrides(folder, "bit_flip"))
    assert run.kinds() == ["replay", "verdict"]
    found = run.of("verdict")[0]
    assert found["cause"] == "hardware" and found["ranks"] == [0]
    assert run.final == clean.final, "the replay is the undisturbed run, bit by bit"


def test_moments_that_were_lost_once_are_the_hardware_too(folder, clean):
    run = train(overrides(folder, "second_moment", "guard.provoke.times=1", "run.name=moments_once"))
    assert run.kinds() == ["replay", "verdict"], "loss and gradient are as ever: only the update tells"
    assert run.of("verdict")[0]["cause"] == "hardware" and run.of("verdict")[0]["ranks"] == [0]
    assert run.final == clean.final


def test_non_finite_gradients_are_refused_with_every_weight_unchanged(folder, clean):
    seen = {}

    class Look(Hook):
        def on_step_start(self, trainer):
            if trainer.step in (STEP - 1, STEP):
                seen[trainer.step] = [box.tensor.clone() for box in trainer.boxes()]

    run = train(overrides(folder, "nan"), Look())
    assert run.kinds() == ["skip"] and run.of("skip")[0]["cause"] == "nonfinite"
    assert all(torch.equal(a, b) for a, b in zip(seen[STEP - 1], seen[STEP], strict=True))
    assert run.records[STEP]["skipped"] == 0 and run.final < clean.final + 0.05


def test_watch_reports_and_does_nothing(folder):
    run = train(overrides(folder, "second_moment", "guard=watch", "guard.snapshot_lags=[]", "run.name=watch"))
    assert run.kinds() == [] and run.of("spike")[0]["cause"] == "weights"
    assert [r["step"] for r in run.records] == list(range(1, END + 1))
    assert max(r["loss"] for r in run.records[STEP:]) > 5


def test_without_a_probe_the_persistence_of_the_loss_decides(folder):
    run = train(overrides(folder, "second_moment", "guard.probe_sequences=0", "run.name=unprobed", steps=70))
    assert run.kinds().count("replay") == 1 and run.kinds()[-1] == "rollback"
    assert [r["step"] for r in run.records][-1] == 70


def test_trouble_that_stays_ends_with_a_report_and_status_3(folder):
    rungs = "guard.rungs=[{action: rollback, budget: 1}, {action: lower_lr, lr_scale: 0.5, rewarm_steps: 100}, {action: give_up}]"
    run = train(overrides(folder, "second_moment", rungs, "guard.provoke.times=99", "run.name=hopeless"))
    assert run.status == 3
    assert run.kinds() == ["replay", "rollback", "rollback", "give_up"]
    assert [e["lr_scale"] for e in run.of("lr_adjust")] == [0.5]
    end = run.of("give_up")[0]
    assert end["suspects"][0]["document"] >= 0 and any("qk_norm" in hint for hint in end["advice"])
    text = (run.folder / "guard_report.txt").read_text()
    assert "document" in text and "offset" in text and "qk_norm" in text


class DieAfter(Hook):
    """Dies right after an event of this kind was written."""

    def __init__(self, kind):
        self.kind = kind

    def on_train_start(self, trainer):
        write = trainer.events.write

        def dying(kind, **fields):
            write(kind, **fields)
            if kind == self.kind:
                raise Crash

        trainer.events.write = dying


@pytest.mark.parametrize("kind", ["replay", "rollback"])
def test_a_crash_in_the_middle_of_a_recovery_resumes_it(folder, kind):
    name = f"crash_{kind}"
    arguments = overrides(folder, "second_moment", f"run.name={name}", "checkpoint.every=41", "checkpoint.keep=0")
    with pytest.raises(Crash):
        train([*arguments, "checkpoint.every=10"], DieAfter(kind))
    # The new process has not struck yet: as a true fault, it strikes in its replay.
    run = train(arguments)
    resumed = run.of("resume_recovery")[0]
    assert resumed["step"] == 30, "the checkpoint of step 40 holds what the decision left behind"
    assert run.kinds()[:2] == (["replay", "rollback"])
    assert run.records[-1]["step"] == END and run.status == 0
    if kind == "rollback":
        first, last = run.of("rollback")[0]["samples"]
        taken = [r["samples"] for r in run.records]
        assert not any(first < position <= last for position in taken)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_looking_at_an_older_state_leaves_every_bit_as_it_was(folder, precision):
    compared = {}

    class Look(Hook):
        def on_step_end(self, trainer, record):
            if trainer.step != 20:
                return
            guard = trainer.hooks[0]
            snapshot = guard.ring.youngest()
            weight = trainer.model_chunks[0].layers[0].mlp.down.weight
            with torch.no_grad():
                weight[0, 0] = 3.0  # damage that the fp32 master does not know of, where there is one
            before = [t.clone() for t in (*(b.tensor for b in trainer.boxes()), weight)]
            now = guard.reference.probe.loss()
            with use_other_weights(trainer, trainer.boxes(), snapshot.tensors):
                compared["then"] = guard.reference.probe.loss()
                compared["used"] = bool(weight[0, 0] != 3.0)
            after = [*(b.tensor for b in trainer.boxes()), weight]
            compared["same"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            compared["again"] = guard.reference.probe.loss() == now != compared["then"]
            compared["training"] = trainer.model_chunks[0].training

    name = f"run.name=look_{precision}"
    train(overrides(folder, "clean", name, f"precision={precision}", steps=21), Look())
    assert compared["used"] and compared["same"] and compared["again"] and compared["training"]


def test_growing_attention_logits_are_told_once_and_at_each_doubling(tmp_path):
    run = train(overrides(tmp_path, "clean", "guard.attention_warning=1e-4", "optim.lr=0.02", steps=30))
    warned = run.of("warning")
    sizes = [event["attention_logit"] for event in warned]
    assert warned[0]["step"] == 1 and 2 <= len(warned) < 12
    assert all(later >= 2 * earlier for earlier, later in zip(sizes, sizes[1:], strict=False))
    seen = [record["attention_logit"] for record in run.records]
    assert sizes[-1] > max(seen) / 2, "none was left out"
    told = describe_event(warned[-1])
    assert f"attention logits reach {sizes[-1]:.0f}" in told and "model.qk_norm=true or optim.qk_clip=100" in told


@pytest.mark.parametrize(("determinism", "told"), [("strict", 0), ("fast", 1)])
def test_a_run_whose_steps_differ_when_made_again_says_that_it_is_not_replayed(folder, determinism, told):
    words = (f"train.determinism={determinism}", f"run.name=said-{determinism}", "guard.provoke.kind=none")
    run = train(overrides(folder, "second_moment", *words, steps=3))
    assert len([event for event in run.of("warning") if event["what"] == "replay"]) == told


def test_a_run_whose_steps_differ_when_made_again_goes_back_at_once(folder):
    run = train(overrides(folder, "second_moment", "train.determinism=fast", "run.name=fast", steps=70))
    assert "replay" not in run.kinds() and run.kinds()[-1] == "rollback"
