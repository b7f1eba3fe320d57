"""Update rules other than AdamW: gradient descent against torch's, and a rule of this file's own that needs whole matrices."""

import pytest
import torch

from megalm.checkpoint.reader import CheckpointReader
from megalm.config import ConfigError, OptimConfig, ParallelConfig
from megalm.config.compose import compose_config
from megalm.config.optim import STATES
from megalm.optim.groups import Choice, Group, Groups, choose_rule, list_usual_choices
from megalm.optim.rules import RULES, SGD, WholeMatrixRule
from megalm.optim.sharded import ShardedOptimizer
from megalm.parallel.mesh import build_mesh
from megalm.parallel.slices import Piece, Role, Slice
from tests.distributed import run_ranks
from tests.optim.test_rules import arguments, run_trainer
from tests.optim.test_sharded import LAYOUTS, LR, OPTIM, Stage, check, plain, train

# ------------------------------------------------------------------------------------------------- gradient descent
SOME = [LAYOUTS[i] for i in (0, 1, 2, 3, 6, 9, 11, 12, 16, 20, 22)]


def descent(nesterov):
    return OptimConfig(name="sgd", momentum=0.8, nesterov=nesterov, weight_decay=0.3)


def train_descent(layout, options, nesterov):
    return train(layout, **options, optim=descent(nesterov))


def torch_descent(nesterov):
    return plain(
        lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.8, nesterov=nesterov),
        [("momentum", "momentum_buffer")],
    )


@pytest.mark.parametrize(("world", "layout", "options"), SOME, ids=str)
def test_gradient_descent_equals_torchs(world, layout, options):
    check(run_ranks(world, train_descent, layout, options, False), torch_descent(False))


@pytest.mark.parametrize("layout", [dict(data=2, zero_stage=1), dict(data=2, data_mode="fully_shard")], ids=str)
def test_gradient_descent_that_looks_ahead_equals_torchs(layout):
    check(run_ranks(2, train_descent, layout, {}, True), torch_descent(True))


def test_gradient_descent_keeps_one_state():
    names = {name for name, *_ in train_descent({}, {}, False)[1]}
    weights = {name for name in names if not name.startswith("optimizer.")}
    assert names - weights == {f"optimizer.momentum.{name}" for name in weights}


ONWARD = ["optim=sgd", "optim.lr=0.05", "guard=off"]


def onward(folder, run, *overrides, world=1):
    """Six steps of gradient descent; returns (losses, all that the last checkpoint holds)."""
    words = [*arguments(folder, [*ONWARD, *overrides], steps=6), f"run.name={run}"]
    losses = run_ranks(world, losses_of, words, world)[0] if world > 1 else losses_of(words, world)
    return losses, dict(CheckpointReader(folder / "runs" / run).tensors(optimizer=True))


def losses_of(words, world):
    return run_trainer(words, world)[0]


def test_gradient_descent_learns_and_goes_on_from_its_checkpoint(tmp_path):
    losses, whole = onward(tmp_path, "whole")
    assert losses[-1] < losses[0]
    half = f"checkpoint.load_path={tmp_path}/runs/whole/checkpoints/step-00000003"
    again, resumed = onward(tmp_path, "resumed", half)
    assert again == losses[3:] and whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole), "to the bit on the same layout"
    assert whole["optimizer.momentum.embedding.weight"].any()
    for layout in ("parallel=zero2", "parallel.data_mode=fully_shard", "parallel.tensor=2", "parallel.pipeline=2"):
        name = layout.replace("=", "-")
        again, elsewhere = onward(tmp_path, name, half, layout, world=2)
        assert again == pytest.approx(losses[3:], abs=1e-5), layout
        assert all(torch.allclose(whole[n], elsewhere[n], atol=1e-5) for n in whole), layout


def test_another_rules_checkpoint_is_refused_and_its_weights_are_taken(tmp_path):
    onward(tmp_path, "whole")
    half = f"checkpoint.load_path={tmp_path}/runs/whole/checkpoints/step-00000003"
    with pytest.raises(ConfigError, match="The weights agree, the optimizer does not"):
        onward(tmp_path, "other", half, "optim=adamw", "optim.lr=1e-3")


# ---------------------------------------------------------------------------------------------------- whole matrices
class UnitMatrix(WholeMatrixRule):
    """Every tensor moves by its summed gradients, divided by their norm: a part of it would give another direction."""

    states = ("total",)

    def prepare(self, gradient, state):
        return state["total"].add_(gradient)

    def transform(self, matrix):
        return matrix / (matrix.norm() + 1e-12)

    def cost(self, shape):
        return 1.0

    def expected_size(self, shape):
        return 1.0


def train_unit(layout):
    RULES["unit"] = UnitMatrix  # this rank's own copy
    try:
        norms, boxes, *_ = train(layout, optim=OptimConfig(name="unit", weight_decay=0.3))
    finally:
        del RULES["unit"]
    return norms, boxes


WHOLE = [
    (2, dict(data=2)),
    (2, dict(data=2, zero_stage=1)),
    (2, dict(data=2, zero_stage=2)),
    (4, dict(data=4, zero_stage=2)),
    (4, dict(pipeline=2, data=2, zero_stage=2)),
    (2, dict(tensor=2)),
    (4, dict(tensor=4)),
    (4, dict(tensor=2, data=2, zero_stage=1)),
    (4, dict(tensor=2, pipeline=2)),
    (2, dict(data=2, data_mode="fully_shard")),
    (4, dict(tensor=2, data=2, data_mode="fully_shard")),
]


@pytest.mark.parametrize(("world", "layout"), WHOLE, ids=str)
def test_a_rule_for_whole_matrices_is_the_same_on_every_layout(world, layout):
    norms, boxes = train_unit({})
    check(run_ranks(world, train_unit, layout), (norms, {name: values for name, _, _, values in boxes}))


def boundaries(bucket_mb, optim, known=None):
    if known:
        RULES["unit"] = known
    try:
        parallel = ParallelConfig(zero_stage=1, bucket_mb=bucket_mb)
        mesh = build_mesh(parallel)
        optimizer = ShardedOptimizer([Stage(mesh, False)], optim, mesh, parallel)
    finally:
        RULES.pop("unit", None)
    found = []
    buckets = [bucket for bucket in optimizer.buckets if bucket.group.rule.whole_matrices or not known]
    for bucket in buckets:
        part = bucket.length // bucket.shards
        found += [(entry.start // part, (entry.stop - 1) // part) for entry in bucket.entries]
    held = {s.piece.name for bucket in buckets for s in bucket.part().stretches}
    return found, held, [len(bucket.entries) for bucket in buckets]


@pytest.mark.parametrize("bucket_mb", [0.0003, 25.0])
def test_shards_end_where_tensors_end(bucket_mb):
    per_rank = run_ranks(2, boundaries, bucket_mb, OptimConfig(name="unit"), UnitMatrix)
    for found, held, counts in per_rank:
        assert all(first == last for first, last in found) and {first for first, _ in found} == {0, 1}
        assert held and sum(counts) == len(found)
    assert not per_rank[0][1] & per_rank[1][1], "a tensor on two ranks"
    cut = run_ranks(2, boundaries, bucket_mb, OPTIM)[0][0]
    assert any(first != last for first, last in cut), "an elementwise rule's shards need not"


# -------------------------------------------------------------------------------------------------------- the seam
def test_configuration_and_rules_know_the_same_states():
    assert {name: rule.states for name, rule in RULES.items()} == STATES


def test_an_unknown_rule_lists_what_there_is():
    with pytest.raises(ConfigError, match="optim.name=lion.*adamw, muon, sgd"):
        choose_rule(OptimConfig(name="lion"))
    with pytest.raises(ConfigError, match="optim.name=lion.*adamw.*sgd"):
        compose_config(["+model=tiny", "optim.name=lion"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.momentum=0.5"], "optim.momentum=0.5 is read by optim.name=sgd alone"),
        (["optim=sgd", "optim.betas=[0.9,0.99]"], "optim.betas=[0.9, 0.99] is read by optim.name=adamw or muon alone"),
        (["optim.muon.steps=3"], "is read by optim.name=muon alone"),
        (["optim=muon", "optim.update_clip=true"], "is read by optim.name=adamw alone"),
        (["optim.groups=[{rule: lion}]"], "optim.groups: rule=lion: there is no such update rule"),
        (["optim.update_clip=true", "optim.groups=[{roles: [bias], rule: sgd}]"], "leave one of the two out"),
        (["optim=muon", "optim.muon.coefficients=best"], "not one of quintic, jordan, polar_express"),
        (["optim=sgd", "optim.update_clip=true"], "sgd reads momentum, nesterov"),
        (["optim=sgd", "optim.momentum=0", "optim.nesterov=true"], "optim.momentum=0: give it one"),
        (["optim=sgd", "guard.provoke.kind=zero_second_moment"], "sgd keeps no second moment"),
        (["optim=sgd", "optim.momentum=1"], "below 1"),
    ],
    ids=str,
)
def test_a_setting_that_the_rule_does_not_read_is_refused(overrides, said):
    with pytest.raises(ConfigError) as error:
        compose_config(["+model=tiny", *overrides])
    assert said in str(error.value)


def slice_named(role, *names):
    return Slice(tuple(Piece(name, (2, 2), (0, 0), (2, 2), 2 * row) for row, name in enumerate(names)), role)


def test_the_first_choice_that_takes_a_parameter_gives_its_group():
    rule = SGD(descent(False))
    slow, usual = Group(rule, rate=0.1), list_usual_choices(OPTIM)
    groups = Groups([Choice(slow, frozenset({Role.MATRIX}), ("*.query.weight", "*.key.weight")), *usual])
    assert groups.of(slice_named(Role.MATRIX, "layers.0.query.weight", "layers.0.key.weight")) is slow
    assert groups.of(slice_named(Role.MATRIX, "layers.0.up.weight")).decay == OPTIM.weight_decay
    assert groups.of(slice_named(Role.BIAS, "layers.0.query.weight")).decay == 0
    with pytest.raises(ConfigError, match=r"takes layers.0.query.weight, but .* layers.0.value.weight"):
        groups.of(slice_named(Role.MATRIX, "layers.0.query.weight", "layers.0.value.weight"))
