"""Muon against torch's, against a singular value decomposition, and against itself on every layout; groups of parameters."""

from dataclasses import replace

import pytest
import torch

from megalm.checkpoint.reader import CheckpointReader
from megalm.config import ConfigError, OptimConfig, ParallelConfig
from megalm.config.compose import compose_config
from megalm.config.optim import GroupConfig, MuonConfig
from megalm.optim.fully_sharded import FullyShardedOptimizer
from megalm.optim.groups import Groups, list_usual_choices
from megalm.optim.rules import AdamW, Muon, Update, muon
from megalm.optim.rules.muon import COEFFICIENTS, JORDAN, SCALES, multiply_symmetric, orthogonalize
from megalm.optim.rules.whole import deal
from megalm.optim.sharded import ShardedOptimizer
from megalm.parallel.initialize import initialize
from megalm.parallel.mesh import build_mesh
from megalm.parallel.slices import Piece, Role, Slice
from megalm.plan.layout import count_states
from tests.distributed import run_ranks
from tests.optim.test_rules import arguments, run_trainer
from tests.optim.test_sharded import Stage, check, train

MUON = OptimConfig(name="muon", weight_decay=0.3, muon=MuonConfig(coefficients="jordan"))


# --------------------------------------------------------------------------------------------------- the orthogonal matrix
def matrix_with(singular_values, rows, columns):
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(rows, len(singular_values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(singular_values), generator=generator, dtype=torch.float64))[0]
    return left, right, left @ torch.diag(torch.tensor(singular_values, dtype=torch.float64)) @ right.t()


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)], ids=str)
def test_steps_that_end_exactly_give_the_nearest_orthogonal_matrix(shape):
    values = torch.linspace(0.1, 1.0, min(shape)).tolist()
    left, right, matrix = matrix_with(values, *shape)
    found = orthogonalize(matrix, (JORDAN[0],) * 8 + ((2.0, -1.5, 0.5),) * 4)
    assert (found - left @ right.t()).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "low", "high"), [("jordan", 0.65, 1.2), ("quintic", 0.95, 1.05), ("polar_express", 0.8, 1.18)]
)
def test_coefficients_bring_singular_values_near_one(name, low, high):
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, COEFFICIENTS[name], 1.02 if name == "polar_express" else 1.0))
    assert low < values.min() and values.max() < high


def test_zeros_give_zeros_and_size_does_not_matter():
    assert not orthogonalize(torch.zeros(4, 6), JORDAN).any()
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        orthogonalize(1000 * matrix, JORDAN), orthogonalize(matrix, JORDAN), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)], ids=str)
def test_an_update_is_as_large_as_expected_and_with_match_rms_as_adamws(shape):
    rule = Muon(OptimConfig(name="muon"))
    update = rule.transform(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    size = float(update.square().mean().sqrt())
    assert size == pytest.approx(rule.expected_size(shape), rel=0.05) and size == pytest.approx(0.2, rel=0.05)
    assert SCALES["jordan"](64, 16) == 2.0 and SCALES["jordan"](16, 64) == 1.0 and SCALES["width"](16, 64) == 0.5


@pytest.mark.parametrize("rows", [64, 128, 130, 256])
def test_a_symmetric_product_is_the_whole_one(rows):
    generator = torch.Generator().manual_seed(2)
    x, other = torch.randn(rows, 300, generator=generator), torch.randn(rows, rows, generator=generator)
    gram = multiply_symmetric(x)
    assert torch.equal(gram, gram.t()) and torch.allclose(gram, x @ x.t(), atol=1e-3, rtol=1e-5)
    added = other + other.t()
    found = multiply_symmetric(gram, added, beta=0.5, alpha=-2.0)
    torch.testing.assert_close(found, 0.5 * added - 2.0 * gram @ gram, atol=1e-1, rtol=1e-5)
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(multiply_symmetric(batch), torch.stack([gram, 4 * gram]))


def test_matrices_of_equal_shape_go_through_the_steps_together(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    matrices = [torch.randn(shape, generator=generator) for shape in ((16, 24), (24, 16), (16, 24), (8, 8), (16, 24))]
    rule = Muon(MUON)
    alone = rule.transform_all(matrices)
    for elements in (1 << 26, 2 * 16 * 24, 1):
        monkeypatch.setattr(muon, "_TOGETHER", elements)
        for got, want in zip(rule.transform_together(matrices), alone, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert rule.transform_all([]) == rule.transform_together([]) == []


# ------------------------------------------------------------------------------------------------------------- torch's own
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["match_rms", "jordan"])
def test_twenty_updates_equal_torchs(nesterov, scale, monkeypatch):
    import torch.optim._muon as theirs

    def in_fp32(gradient, coefficients, steps, eps):
        return orthogonalize(gradient, (tuple(coefficients),) * steps)

    monkeypatch.setattr(theirs, "_zeropower_via_newtonschulz", in_fp32)
    weight = torch.nn.Parameter(torch.randn(12, 20, generator=torch.Generator().manual_seed(5)))
    ours, momentum = weight.detach().clone(), torch.zeros(12, 20)
    adjust = {"match_rms": "match_rms_adamw", "jordan": "original"}[scale]
    other = torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    settings = MuonConfig(momentum=0.9, nesterov=nesterov, scale=scale, coefficients="jordan")
    rule = Muon(OptimConfig(name="muon", weight_decay=0.1, muon=settings))
    generator = torch.Generator().manual_seed(6)
    for _ in range(20):
        gradient = torch.randn(12, 20, generator=generator)
        weight.grad = gradient.clone()
        other.step()
        direction = rule.transform(rule.prepare(gradient, {"muon_momentum": momentum}))
        ours.mul_(1 - 0.02 * 0.1).sub_(direction, alpha=0.02)
    # torch averages the momentum instead of summing it: the same direction, another length, which the steps divide away
    torch.testing.assert_close(ours, weight.detach(), atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- layouts
def train_muon(layout, options):
    return train(layout, **options, optim=MUON)[:2]


LAYOUTS = [
    (2, dict(data=2), {}),
    (2, dict(data=2, zero_stage=1), {}),
    (4, dict(data=4, zero_stage=2), {}),
    (2, dict(tensor=2), {}),
    (2, dict(tensor=2), dict(sequence=True)),
    (4, dict(tensor=4), {}),
    (4, dict(tensor=2, data=2, zero_stage=1), {}),
    (4, dict(pipeline=2, data=2, zero_stage=2), {}),
    (2, dict(data=2, data_mode="fully_shard"), {}),
    (4, dict(tensor=2, data=2, data_mode="fully_shard"), {}),
]


@pytest.mark.parametrize(("world", "layout", "options"), LAYOUTS, ids=str)
def test_every_layout_makes_the_same_updates(world, layout, options):
    norms, boxes = train_muon({}, {})
    check(run_ranks(world, train_muon, layout, options), (norms, {name: values for name, _, _, values in boxes}))


BITWISE = [
    (2, dict(data=2)),
    (2, dict(data=2, zero_stage=1)),
    (2, dict(data=2, zero_stage=2)),
    (4, dict(data=4, zero_stage=2)),
    (2, dict(pipeline=2)),
    (4, dict(pipeline=2, data=2, zero_stage=2)),
    (2, dict(data=2, data_mode="fully_shard")),
    (2, dict(tensor=2)),
    (4, dict(tensor=4)),
    (4, dict(tensor=2, data=2, zero_stage=1)),
    (4, dict(tensor=2, data=2, data_mode="fully_shard")),
]


def update_once(layout):
    """Weights and momentum after one update, of gradients that are set and so alike on every layout."""
    parallel = ParallelConfig(**layout)
    mesh = build_mesh(parallel)
    stages = [Stage(mesh, False, mesh.pipeline.rank == 0, mesh.pipeline.rank == mesh.pipeline.size - 1)]
    kind = FullyShardedOptimizer if parallel.data_mode == "fully_shard" else ShardedOptimizer
    more = () if kind is FullyShardedOptimizer else (parallel,)
    for stage in stages:
        initialize(stage, 7)
    optimizer = kind(stages, MUON, mesh, *more)
    for step in range(2):
        for part in optimizer.parts():
            fill_by_name(part, step)
            part.group.rule.step(part, Update(lr=0.1, step=step + 1))
    optimizer.gather_parameters()
    return None, [(box.name, box.global_shape, box.offset, box.tensor.clone()) for box in optimizer.boxes()]


def fill_by_name(part, step):
    """Every element of a gradient is a function of its tensor's name and its place in it."""
    flat = torch.zeros_like(part.master)
    for s in part.stretches:
        piece = s.piece
        seed = sum(map(ord, piece.name)) + 1000 * step
        whole = torch.randn(piece.global_shape, generator=torch.Generator().manual_seed(seed))
        box = whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))]
        flat[s.start : s.stop] = box.flatten()[s.skip : s.skip + s.stop - s.start]
    object.__setattr__(part, "gradient", lambda: flat)


@pytest.mark.parametrize(("world", "layout"), BITWISE, ids=str)
def test_from_the_same_gradients_every_layout_makes_the_same_update_bit_by_bit(world, layout):
    whole = {name: tensor for name, _, _, tensor in update_once({})[1]}
    seen = set()
    for _, boxes in run_ranks(world, update_once, layout):
        for name, _, offset, tensor in boxes:
            box = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
            assert torch.equal(tensor, whole[name][box]), name
            seen.add(name)
    assert seen == set(whole)


def test_matrices_stored_together_are_orthogonalised_each_by_itself_and_tables_take_adamw():
    states = {name for name, *_ in train_muon({}, {})[1] if name.startswith("optimizer.")}
    assert {name for name in states if ".muon_momentum." in name} == {
        f"optimizer.muon_momentum.{name}.weight" for name in ("q", "k", "down")
    }
    assert "optimizer.exp_avg.embedding.weight" in states and "optimizer.exp_avg_sq.norm.bias" in states


def onward(folder, run, *overrides, world=1):
    words = [*arguments(folder, ["optim=muon", "optim.lr=0.01", "guard=off", *overrides], steps=6), f"run.name={run}"]
    losses = run_ranks(world, losses_of, words, world)[0] if world > 1 else losses_of(words, world)
    return losses, dict(CheckpointReader(folder / "runs" / run).tensors(optimizer=True))


def losses_of(words, world):
    return run_trainer(words, world)[0]


def test_muon_learns_and_goes_on_from_its_checkpoint_on_any_layout(tmp_path):
    losses, whole = onward(tmp_path, "whole")
    assert losses[-1] < losses[0]
    half = f"checkpoint.load_path={tmp_path}/runs/whole/checkpoints/step-00000003"
    again, resumed = onward(tmp_path, "resumed", half)
    assert again == losses[3:] and all(torch.equal(whole[name], resumed[name]) for name in whole)
    for layout in ("parallel=zero2", "parallel.data_mode=fully_shard", "parallel.tensor=2"):
        again, elsewhere = onward(tmp_path, layout.replace("=", "-"), half, layout, world=2)
        assert again == pytest.approx(losses[3:], abs=1e-5), layout
        assert all(torch.allclose(whole[n], elsewhere[n], atol=1e-5) for n in whole), layout
    with pytest.raises(ConfigError, match="The weights agree, the optimizer does not"):
        onward(tmp_path, "other", half, "optim=adamw", "optim.lr=1e-3")


HEADS = OptimConfig(name="muon", weight_decay=0.3, muon=MuonConfig(coefficients="jordan", split_heads=True))


def train_heads(layout, options):
    return train(layout, **options, optim=HEADS)[:2]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, dict(data=2, zero_stage=1)),
        (2, dict(tensor=2)),
        (4, dict(tensor=4)),
        (2, dict(data=2, data_mode="fully_shard")),
    ],
    ids=str,
)
def test_heads_that_are_split_move_alike_on_every_layout(world, layout):
    norms, boxes = train_heads({}, {})
    check(run_ranks(world, train_heads, layout, {}), (norms, {name: values for name, _, _, values in boxes}))


def test_each_head_is_orthogonalised_by_itself_where_that_is_asked_for():
    piece = Piece("layers.0.attention.query.weight", (24, 16), (0, 0), (24, 16), unit=8)
    matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(8))
    split, whole = Muon(HEADS), Muon(MUON)
    (found,), (together,) = (rule._transform_tensors([matrix], [piece]) for rule in (split, whole))
    assert torch.equal(found, torch.cat([split.transform(head) for head in matrix.split(8)]))
    assert torch.equal(together, whole.transform(matrix)) and (found - together).norm() > 0.2 * together.norm()
    assert split.count_blocks(replace(piece, unit=0)) == whole.count_blocks(piece) == 1


def test_the_heaviest_work_is_dealt_first():
    assert deal([1.0, 5.0, 4.0, 2.0], 2) == [0, 0, 1, 1]
    assert deal([3.0], 4) == [0]


# ------------------------------------------------------------------------------------------------------------------ groups
def slice_named(role, *names, shape=(2, 2)):
    return Slice(tuple(Piece(name, shape, (0,) * len(shape), shape, 2 * row) for row, name in enumerate(names)), role)


def groups_of(**optim):
    return Groups(list_usual_choices(OptimConfig(**optim)))


@pytest.mark.parametrize(
    ("role", "rule", "decay"),
    [
        (Role.MATRIX, Muon, 0.1),
        (Role.EXPERT_MATRIX, Muon, 0.1),
        (Role.EMBEDDING, AdamW, 0.0),
        (Role.OUTPUT, AdamW, 0.1),
        (Role.ROUTER, AdamW, 0.1),
        (Role.NORM, AdamW, 0.0),
    ],
    ids=str,
)
def test_a_role_decides_the_rule(role, rule, decay):
    group = groups_of(name="muon", muon=MuonConfig(adamw_rate=0.5)).of(slice_named(role, "layers.0.x.weight"))
    assert isinstance(group.rule, rule) and group.decay == decay
    assert group.rate == (1.0 if rule is Muon else 0.5)


def test_groups_of_the_configuration_come_first_and_leave_what_they_do_not_say():
    groups = groups_of(
        name="muon",
        groups=[
            GroupConfig(names=["layers.0.*"], rate=0.1),
            GroupConfig(roles=["output"], weight_decay=0.0),
            GroupConfig(roles=["matrix"], names=["*.down.weight"], rule="adamw"),
        ],
    )
    slow = groups.of(slice_named(Role.MATRIX, "layers.0.mlp.up.weight"))
    assert isinstance(slow.rule, Muon) and (slow.rate, slow.decay) == (0.1, 0.1)
    assert groups.of(slice_named(Role.NORM, "layers.0.mlp_norm.weight", shape=(2,))).decay == 0.0
    assert groups.of(slice_named(Role.OUTPUT, "output.weight")).decay == 0.0
    assert isinstance(groups.of(slice_named(Role.MATRIX, "layers.1.mlp.down.weight")).rule, AdamW)
    assert isinstance(groups.of(slice_named(Role.MATRIX, "layers.1.mlp.up.weight")).rule, Muon)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="which is no matrix, to a rule that updates matrices alone"):
        groups = groups_of(groups=[GroupConfig(names=["layers.0.*"], rule="muon")])
        groups.of(slice_named(Role.NORM, "layers.0.mlp_norm.weight", shape=(2,)))
    with pytest.raises(ConfigError, match=r"roles=\['head'\]: known roles are matrix, expert_matrix"):
        groups_of(groups=[GroupConfig(roles=["head"])])
    with pytest.raises(ConfigError, match="steps=6.*5 different steps"):
        Muon(OptimConfig(name="muon", muon=MuonConfig(steps=6)))


def test_the_planner_counts_one_state_for_matrices_and_two_for_the_rest():
    config = compose_config(["+model=7b", "optim=muon"])
    assert 1.0 < count_states(config) < 1.1
    assert count_states(compose_config(["+model=7b"])) == 2.0
