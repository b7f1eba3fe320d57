"""A mixture's run is the same on every layout: loss, every gradient, the norm, balance losses; counts and states exactly."""

import pytest
import torch

from megalm.architecture.layers import specify_layers
from megalm.config.compose import compose_config
from megalm.model.mixture import Mixture
from megalm.model.positions import Where
from megalm.parallel.initialize import initialize
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import build_mesh
from tests.distributed import run_ranks
from tests.mixtures import KINDS, mixture_run, train, whole_gradients

LAYOUTS = {
    "recompute": (1, ["parallel.recompute=full"]),
    "chunks of rows, selective": (1, ["parallel.expert_rows=20", "parallel.recompute=selective"]),
    "ep 2": (2, ["parallel.data=2", "parallel.expert=2"]),
    "ep 2, all-gather": (2, ["parallel.data=2", "parallel.expert=2", "parallel.expert_dispatch=all_gather"]),
    "tp 2": (2, ["parallel.tensor=2", "parallel.zero_stage=1"]),
    "tp 2 sequence, ep 2": (2, ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"]),
    "tp 2 sequence, etp 2": (2, ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert_tensor=2"]),
    "cp 2, ep 2": (2, ["parallel.context=2", "parallel.expert=2", "parallel.recompute=full"]),
    "dp 2 tp 2, ep 2 etp 2, zero 2": (
        4,
        [
            *("parallel.data=2", "parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"),
            *("parallel.expert_tensor=2", "parallel.zero_stage=2"),
        ],
    ),
    "dp 4, ep 2, zero 2": (4, ["parallel.data=4", "parallel.expert=2", "parallel.zero_stage=2"]),
    "dp 2 pp 2, ep 2, zb-h1": (
        4,
        [
            "parallel.data=2",
            "parallel.pipeline=2",
            "parallel.expert=2",
            "parallel.schedule=zb-h1",
            "parallel.zero_stage=1",
        ],
    ),
    "dp 2, ep 2, fully sharded": (2, ["parallel.data=2", "parallel.expert=2", "parallel.data_mode=fully_shard"]),
    "dp 4, ep 2, fully sharded": (4, ["parallel.data=4", "parallel.expert=2", "parallel.data_mode=fully_shard"]),
}
"""(ranks, overrides) by what is special in it."""
TURNS = [(kind, layout) for place, layout in enumerate(LAYOUTS) for kind in (list(KINDS) * 2)[place % 4 :][:2]]
"""Each layout with two kinds, in turn."""
_ALONE = {}


def alone(kind, folder):
    """The run in one process, made once."""
    if kind not in _ALONE:
        arguments = mixture_run(folder, kind)
        _ALONE[kind] = run_ranks(1, train, 1, arguments, folder)[0]
    return _ALONE[kind]


def close(found, wanted):
    return found == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("kind", "layout"), TURNS, ids=[f"{kind}, {layout}" for kind, layout in TURNS])
def test_the_layout_does_not_change_the_run(tmp_path, kind, layout):
    records, gradients, states = alone(kind, tmp_path)
    world, words = LAYOUTS[layout]
    ranks = run_ranks(world, train, world, mixture_run(tmp_path, kind, *words), tmp_path)
    for own, _, _ in ranks:
        for found, wanted in zip(own, records, strict=True):
            assert close(found["loss"], wanted["loss"]) and close(found["grad_norm"], wanted["grad_norm"])
            assert close(found["router/balance_loss"], wanted["router/balance_loss"])
            assert close(found["router/z_loss"], wanted["router/z_loss"])
            for name in wanted:
                if name.endswith(("max_load", "dead")):
                    assert found[name] == wanted[name], name  # counts are exact
    wanted = whole_gradients([gradients])
    found = whole_gradients([held for _, held, _ in ranks])
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5 * max(largest, 1e-3), msg=name)
    held = [own for _, _, own in ranks]
    assert set().union(*held) == set(states)
    for own in held:
        for name, state in own.items():
            assert torch.equal(state, states[name]), name
    assert all(state.any() for state in states.values())


def run_lengths(words):
    """Outputs and input gradients for sequences that the tensor ranks do not divide, and shorter ones than they are many."""
    config = compose_config(["+model=tiny-moe", "model.hidden_size=24", "model.moe.ffn_hidden_size=20", *words])
    context = LayerContext(build_mesh(config.parallel, "cpu"), config.parallel)
    mixture = Mixture(specify_layers(config.model)[1].mlp, context, name="m")
    initialize(mixture, 5)
    found = []
    for length in (1, 3, 6, 7):
        x = torch.randn(length, 2, 24, generator=torch.Generator().manual_seed(length)).requires_grad_()
        y = mixture(x, Where())
        y.square().sum().backward()
        found += [y.detach(), x.grad]
    return found


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, ["parallel.tensor=2"]),
        (4, ["parallel.tensor=4", "parallel.expert=2", "parallel.expert_tensor=2", "model.num_kv_heads=4"]),
        (4, ["parallel.tensor=4", "parallel.expert=4", "parallel.expert_dispatch=all_gather", "model.num_kv_heads=4"]),
    ],
    ids=["tp 2", "ep 2 etp 2", "ep 4, all-gather"],
)
def test_tokens_are_shared_out_over_tensor_ranks_that_do_not_divide_them(world, words):
    (alone,) = run_ranks(1, run_lengths, [])
    for rank in run_ranks(world, run_lengths, words):
        for found, wanted in zip(rank, alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
