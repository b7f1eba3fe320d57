"""Runs of mixtures: resumed on other ranks of experts, their states where nothing may move them, loads at the edge."""

import pytest
import torch

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.guard.replay import find_odd_replicas
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import build_mesh
from megalm.parallel.slices import Role, Slice, state_boxes
from megalm.train.hooks import Hook
from megalm.train.parts import build_trainer
from tests.distributed import run_ranks
from tests.mixtures import gradients_of, mixture_run, whole_gradients
from tests.mixtures import train as train_steps


def make(world, arguments, folder, hooks=()):
    config = compose_config(arguments)
    resolve(config, world)
    folder.mkdir(exist_ok=True)
    return build_trainer(config, build_mesh(config.parallel, "cpu"), folder, hooks=hooks)


def close(trainer):
    trainer.checkpoints.close()
    trainer.batch_source.close()


def run_to(world, arguments, folder):
    """Train (on from where the folder stands) to train.steps; boxes as they were loaded and at the end, then the losses."""
    trainer = make(world, arguments, folder)
    losses, began = [], []

    class Watch(Hook):
        def on_train_start(self, trainer):
            began.extend((box.name, box.offset, box.tensor.clone()) for box in trainer.boxes())

        def on_step_end(self, trainer, record):
            losses.append((record["loss"], record["grad_norm"]))

    trainer.hooks.append(Watch())
    assert trainer.train() == 0
    return began, [(box.name, box.offset, box.tensor.clone()) for box in trainer.boxes()], losses


def whole(ranks, shapes):
    """Tensors from the boxes of all ranks."""
    found = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    for boxes in ranks:
        for name, offset, tensor in boxes:
            found[name][tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))] = tensor
    return found


@pytest.mark.parametrize("kind", ["deepseek", "gpt-oss", "prediction"])
def test_a_run_goes_on_over_any_ranks_of_experts_bit_by_bit(tmp_path, kind):
    words = ("checkpoint.every=3", "checkpoint.keep=9", "optim.schedule=constant")  # a course that no length changes
    straight = mixture_run(tmp_path, kind, "train.steps=9", *words)
    (alone,) = run_ranks(1, run_to, 1, straight, tmp_path / "straight")
    shapes = {name: tuple(tensor.shape) for name, _, tensor in alone[1]}
    stages = [
        (1, 3, []),
        (4, 6, ["parallel.data=4", "parallel.expert=4", "parallel.zero_stage=1"]),
        (2, 9, ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=1", "parallel.expert_tensor=2"]),
    ]
    losses, before = [], None
    for world, steps, layout in stages:
        arguments = mixture_run(tmp_path, kind, f"train.steps={steps}", *words, *layout)
        ranks = run_ranks(world, run_to, world, arguments, tmp_path / "moved")
        if before is not None:
            for name, tensor in whole([began for began, _, _ in ranks], shapes).items():
                assert torch.equal(tensor, before[name]), name
        before = whole([ended for _, ended, _ in ranks], shapes)
        losses += ranks[0][2]
    assert any(name.startswith("optimizer.exp_avg.layers.1.mlp.experts.") for name in before)
    assert any("router.selection_bias" in name or "load_shares" in name for name in before)
    assert losses == [pytest.approx(step, rel=2e-5) for step in alone[2]]


def states_of(trainer):
    return [box.tensor.clone() for chunk in trainer.model_chunks for box in state_boxes(chunk)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Refusing(Hook):
    def on_gradients(self, trainer, signals):
        return False


def test_a_refused_update_and_an_evaluation_move_no_state(tmp_path):
    arguments = mixture_run(tmp_path, "deepseek", "train.eval_sequences=4")
    trainer = make(1, arguments, tmp_path, [Refusing()])
    before = states_of(trainer)
    record = trainer.train_step()
    assert record["skipped"] and record["router/max_load"] > 1 and same(states_of(trainer), before)
    trainer.hooks.clear()
    trainer.train_step()
    moved = states_of(trainer)
    assert not same(moved, before)
    evaluated = trainer.evaluate()["eval/loss"]
    assert same(states_of(trainer), moved) and evaluated == trainer.evaluate()["eval/loss"]
    close(trainer)


@pytest.mark.parametrize("kind", ["deepseek", "gpt-oss"])
def test_going_back_brings_the_states_back(tmp_path, kind):
    """As the guard does: tensors of the boxes, then the small state."""
    trainer = make(1, mixture_run(tmp_path, kind), tmp_path)
    trainer.train_step()
    kept, state = [box.tensor.clone() for box in trainer.boxes()], trainer.state_dict()
    first, after = trainer.train_step(), states_of(trainer)
    for box, tensor in zip(trainer.boxes(), kept, strict=True):
        box.tensor.copy_(tensor)
    trainer.restore(state)
    assert not same(states_of(trainer), after)
    assert trainer.train_step()["loss"] == first["loss"] and same(states_of(trainer), after)
    close(trainer)


def test_a_state_counts_each_token_once_whatever_is_computed_again(tmp_path):
    found = []
    for words in ([], ["parallel.recompute=full"], ["parallel.recompute=selective", "parallel.expert_rows=8"]):
        trainer = make(1, mixture_run(tmp_path, "deepseek", *words), tmp_path)
        record = trainer.train_step()
        found.append((states_of(trainer), record["router/1/max_load"]))
        close(trainer)
    assert all(same(states, found[0][0]) and load == found[0][1] for states, load in found)


# ---------------------------------------------------------------------------------------------------------------- loads
def train_skewed(world, arguments, folder, load):
    """Two steps with a selection bias that sends tokens where `load` says, against which no score comes up."""
    trainer = make(world, arguments, folder)
    (bias,) = (box.tensor for chunk in trainer.model_chunks for box in state_boxes(chunk))
    bias.fill_(-100.0)
    bias[list(load)] = 100.0
    records = [trainer.train_step() for _ in range(2)]
    gradients = gradients_of(trainer)
    close(trainer)
    return records, gradients


EDGES = {
    "one expert takes all": ([5], 1),
    "half idle, on one rank": ([0, 1, 2, 3], 2),
    "half idle, on both": ([0, 2, 5, 7], 2),
    "two of the last rank": ([6, 7], 2),
}


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("edge", EDGES)
def test_an_idle_expert_and_an_idle_rank_hang_nothing_and_get_gradients_of_zero(tmp_path, edge, dispatch):
    load, top_k = EDGES[edge]
    words = [f"model.moe.top_k={top_k}", "model.moe.groups=0", "model.moe.top_groups=0", "model.moe.bias_rate=0"]
    arguments = mixture_run(tmp_path, "deepseek", *words, f"parallel.expert_dispatch={dispatch}")
    (alone,) = run_ranks(1, train_skewed, 1, arguments, tmp_path, load)
    arguments += ["parallel.data=4", "parallel.expert=4", "parallel.zero_stage=2"]
    ranks = run_ranks(4, train_skewed, 4, arguments, tmp_path, load)
    wanted, found = whole_gradients([alone[1]]), whole_gradients([held for _, held in ranks])
    for name, gradient in wanted.items():
        if ".experts." in name:
            assert gradient.any() == (int(name.split(".")[4]) in load), name
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5 * max(largest, 1e-3), msg=name)
    assert ranks[0][0][1]["loss"] == pytest.approx(alone[0][1]["loss"], rel=1e-5)
    assert ranks[0][0][0]["router/1/dead"] == 8 - len(load)


def test_micro_batch_balance_depends_on_the_micro_batch_and_the_others_do_not(tmp_path):
    found = {}
    for balance in ("sequence", "global", "micro_batch"):
        for size in (2, 4):
            words = [f"model.moe.balance={balance}", f"train.micro_batch_size={size}"]
            (run,) = run_ranks(1, train_steps, 1, mixture_run(tmp_path, "mixtral", *words), tmp_path)
            found[balance, size] = run[0][-1]["router/balance_loss"]
    for balance in ("sequence", "global"):
        assert found[balance, 2] == pytest.approx(found[balance, 4], rel=1e-5)
    assert found["micro_batch", 2] != pytest.approx(found["micro_batch", 4], rel=1e-3)


def test_experts_over_data_ranks_want_equal_numbers_of_micro_batches(tmp_path):
    words = ["parallel.data=4", "train.global_batch_size=6", "train.micro_batch_size=1"]
    config = compose_config(mixture_run(tmp_path, "mixtral", *words))
    resolve(config, 4)
    config = compose_config(mixture_run(tmp_path, "mixtral", *words, "parallel.expert=2"))
    with pytest.raises(ConfigError, match="6 gives the 4 data ranks different numbers .* use 4 or 8"):
        resolve(config, 4)


def find_odd(world, arguments, folder, damaged):
    trainer = make(world, arguments, folder)
    trainer.train_step()
    clean = find_odd_replicas(trainer.model_chunks, trainer.mesh)
    if trainer.mesh.rank == 0:
        for chunk in trainer.model_chunks:
            for tensor in (*chunk.parameters(), *chunk.buffers()):
                if any(damaged in piece.name for piece in getattr(tensor, "megalm_slice", Slice((), Role.NORM)).pieces):
                    tensor.data[0] += 1.0
    found = find_odd_replicas(trainer.model_chunks, trainer.mesh)
    close(trainer)
    return clean, found


@pytest.mark.parametrize(("damaged", "who"), [(".experts.0.", {0, 2}), ("attention.key", {0}), ("selection_bias", {0})])
def test_replicas_are_compared_with_those_that_hold_the_same_experts(tmp_path, damaged, who):
    arguments = mixture_run(tmp_path, "deepseek", "parallel.data=4", "parallel.expert=2")
    ranks = run_ranks(4, find_odd, 4, arguments, tmp_path, damaged)
    assert all(clean == [] for clean, _ in ranks)
    assert set().union(*(odd for _, odd in ranks)) == who
