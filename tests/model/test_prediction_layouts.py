"""Multi-token prediction gives the same run on every layout: losses by depth, every gradient, the norm; and goes on bitwise."""

import pytest
import torch

from tests.distributed import run_ranks
from tests.mixtures import train, whole_gradients
from tests.small_run import small_run

KINDS = {
    # latent attention, shared experts, groups, a selection bias; a matrix of its own behind the last layer
    "deepseek": [
        "model.moe.num_experts=8", "model.moe.top_k=3", "model.moe.ffn_hidden_size=32", "model.moe.num_shared_experts=1",
        "model.moe.groups=4", "model.moe.top_groups=2", "model.moe.weight_scale=2.5", "model.moe.first_dense=1",
        "model.moe.bias_rate=0.02", "model.moe.balance_loss=1e-2", "model.tie_embeddings=false",
        "model.rope_interleaved=true", "model.num_kv_heads=4",
        "model.latent={key_rank: 12, query_rank: 20, plain_dim: 8, rope_dim: 4, value_dim: 10}",
        "model.prediction.depth=1",
    ],
    # two tokens further, the embedding on both ends anyway
    "tied": ["model.num_layers=3", "model.tie_embeddings=true", "model.prediction.depth=2", "model.prediction.loss=1"],
}  # fmt: skip
LAYOUTS = {
    "recompute": (1, ["parallel.recompute=full"]),
    "micro-batches": (1, ["train.micro_batch_size=4", "parallel.recompute=selective"]),
    "dp 2, zero 2": (2, ["parallel.data=2", "parallel.zero_stage=2"]),
    "fully sharded": (2, ["parallel.data=2", "parallel.data_mode=fully_shard"]),
    "tp 2": (2, ["parallel.tensor=2", "parallel.zero_stage=1"]),
    "tp 2 sequence": (2, ["parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=selective"]),
    "cp 2": (2, ["parallel.context=2"]),
    "cp 2 all-gather, fully sharded": (
        2,
        ["parallel.context=2", "parallel.context_mode=all_gather", "parallel.data_mode=fully_shard"],
    ),
    "pp 2": (2, ["parallel.pipeline=2", "parallel.recompute=full"]),
    "pp 2, fully sharded": (2, ["parallel.pipeline=2", "parallel.data_mode=fully_shard"]),
    "pp 2, zb-h1": (2, ["parallel.pipeline=2", "parallel.schedule=zb-h1"]),
    "pp 2 tp 2 sequence": (
        4,
        ["parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true", "parallel.zero_stage=1"],
    ),
    "pp 2 cp 2": (4, ["parallel.pipeline=2", "parallel.context=2", "parallel.schedule=zb-h1"]),
    "dp 2 cp 2, zero 2": (4, ["parallel.data=2", "parallel.context=2", "parallel.zero_stage=2"]),
}
EXPERTS = {
    "dp 2, zero 2": ["parallel.expert=2"],
    "tp 2 sequence": ["parallel.expert=2"],
    "cp 2": ["parallel.expert=2"],
    "dp 2 cp 2, zero 2": ["parallel.expert=2", "parallel.expert_tensor=2"],
}
_ALONE = {}


def words_of(folder, kind, *overrides):
    usual = ("guard=off", "train.eval_every=0", "train.eval_sequences=0", "optim.eps=1e-6", "checkpoint.every=0")
    return small_run(folder, *KINDS[kind], "model.init_std=0.1", "data.packing=documents", *usual, *overrides)


def alone(kind, folder):
    """The run in one process, made once."""
    if kind not in _ALONE:
        _ALONE[kind] = run_ranks(1, train, 1, words_of(folder, kind), folder)[0]
    return _ALONE[kind]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_does_not_change_the_run(tmp_path, kind, layout):
    records, gradients, states = alone(kind, tmp_path)
    world, words = LAYOUTS[layout]
    more = EXPERTS.get(layout, []) if kind == "deepseek" else []
    ranks = run_ranks(world, train, world, words_of(tmp_path, kind, *words, *more), tmp_path)
    names = [name for name in records[0] if name.startswith("prediction/")]
    assert len(names) == (1 if kind == "deepseek" else 2)
    for own, _, held in ranks:
        for found, wanted in zip(own, records, strict=True):
            for name in ("loss", "grad_norm", *names):
                assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
            for name in wanted:
                if name.endswith(("max_load", "dead")):
                    assert found[name] == wanted[name], name
        for name, state in held.items():
            assert torch.equal(state, states[name]), name
    wanted = whole_gradients([gradients])
    found = whole_gradients([held for _, held, _ in ranks])
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5 * max(largest, 1e-3), msg=name)


@pytest.mark.parametrize("schedule", ["interleaved", "zb-v", "dualpipe-v"])
def test_the_schedule_does_not_change_the_run(tmp_path, schedule):
    layers = ["model.num_layers=4"]
    records, gradients, _ = run_ranks(1, train, 1, words_of(tmp_path, "tied", *layers), tmp_path)[0]
    words = ["parallel.pipeline=2", f"parallel.schedule={schedule}", "parallel.virtual_pipeline=2"]
    ranks = run_ranks(2, train, 2, words_of(tmp_path, "tied", *layers, *words), tmp_path)
    for own, _, _ in ranks:
        for found, wanted in zip(own, records, strict=True):
            for name in ("loss", "grad_norm", "prediction/1/loss", "prediction/2/loss"):
                assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
    wanted = whole_gradients([gradients])
    for name, gradient in whole_gradients([held for _, held, _ in ranks]).items():
        largest = wanted[name].abs().max().item()
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=2e-5 * max(largest, 1e-3), msg=name)
