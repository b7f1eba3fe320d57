"""The layout does not change the answer: representative layouts of `python -m tools.bench layouts`, trained end to end."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tools.bench
from megalm.pipeline.schedule import KINDS
from tests.distributed import run_ranks
from tools.bench.layouts.layouts import (
    MODELS,
    STEPS,
    Layout,
    compare,
    configure,
    list_layouts,
    merge,
    train,
    write_tokens,
)
from tools.subcommands import run_tool

CASES = [
    ("llama", Layout(tensor=2, sequence=True, zero_stage=2, recompute="selective")),
    ("gpt2", Layout(pipeline=2, schedule="1f1b", recompute="full")),
    ("mpt", Layout(context=2, context_mode="all_gather", zero_stage=1)),
    # tied embeddings: first and last stage on one rank, with split backward, beside on two ranks
    ("gpt2", Layout(pipeline=2, schedule="zb-v", recompute="full")),
    ("mpt", Layout(pipeline=2, data=2, schedule="zb-h1", zero_stage=2)),
    # five layers on four stages
    ("llama", Layout(pipeline=2, context=2, schedule="interleaved", recompute="selective")),
    ("gpt2", Layout(data=2, tensor=2, sequence=True, zero_stage=1, recompute="full")),
    ("llama", Layout(tensor=2, pipeline=2, sequence=True, schedule="dualpipe-v")),
    ("uneven", Layout(tensor=2, sequence=True, zero_stage=1, recompute="selective")),
    ("uneven", Layout(tensor=2, context=2)),
    ("capped", Layout(tensor=2, sequence=True, zero_stage=1, recompute="selective")),
    ("capped", Layout(pipeline=2, context=2, schedule="1f1b")),
    ("latent", Layout(tensor=2, sequence=True, zero_stage=1, recompute="selective")),
    ("latent", Layout(tensor=2, context=2)),
    ("sinks", Layout(tensor=2, context=2, context_mode="all_gather", recompute="full")),
    ("sinks", Layout(tensor=2, pipeline=2, sequence=True, schedule="zb-h1")),
]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    tokens = write_tokens(folder)
    return {model: train(configure(model, Layout(), tokens), folder / model) for model in MODELS}, tokens


def body(config, folder: str, reference: dict):
    from megalm.parallel.mesh import build_mesh

    mesh = build_mesh(config.parallel)
    return compare(train(config, Path(folder) / str(dist.get_rank()), mesh), reference)


@pytest.mark.parametrize(("model", "layout"), CASES, ids=[f"{m} {layout}" for m, layout in CASES])
def test_training_follows_one_process(model, layout, references, tmp_path):
    known, tokens = references
    ranks = run_ranks(layout.world_size, body, configure(model, layout, tokens), str(tmp_path), known[model])
    row = merge(model, layout, ranks)
    assert row["equal"], row
    assert row["grad_norm_difference"] < 1e-4, row


def test_the_reference_learns(references):
    for model, reference in references[0].items():
        losses = reference["losses"]
        assert len(losses) == STEPS + 1 and losses[-2] < losses[0] - 0.05, (model, losses)


def test_a_difference_is_seen(references):
    """The comparison itself: a weight, a loss or a missing tensor that is off makes the row unequal."""
    reference = references[0]["llama"]

    def row(**changes):
        ranks = [compare(reference | changes, reference)]
        return merge("llama", Layout(), ranks)

    assert row()["equal"] and row()["weight_difference"] == 0.0
    name, offset, tensor = reference["boxes"][3]
    assert tensor.dim() == 2
    nudged = tensor * 1.01
    seen = row(boxes=[*reference["boxes"][:3], (name, offset, nudged), *reference["boxes"][4:]])
    assert not seen["equal"] and seen["worst_tensor"] == name
    assert seen["worst_tensor_difference"] == pytest.approx(0.01, rel=1e-3)
    assert not row(boxes=reference["boxes"][1:])["equal"]
    assert not row(losses=[x * (1 + 2e-5) for x in reference["losses"]])["equal"]
    assert not row(losses=[float("nan"), *reference["losses"][1:]])["equal"]
    broken = torch.full_like(tensor, float("nan"))
    assert not row(boxes=[*reference["boxes"][:3], (name, offset, broken), *reference["boxes"][4:]])["equal"]


def test_list_layouts_is_there():
    chosen, full = list_layouts(), list_layouts(full=True)
    assert len({str(layout) for layout in full}) == len(full) > 9 * len(chosen) / 2
    shapes = {layout.shape for layout in chosen}
    assert len(shapes) == 15 and (2, 2, 2, 2) not in shapes
    for kind in KINDS:
        met = {(x.zero_stage, x.recompute) for x in chosen if x.schedule == kind and x.pipeline == 2}
        assert len(met) == 9, kind
    assert {x.context_mode for x in chosen if x.sequence and x.context == 2} == {"ring", "all_gather"}
    assert set(map(str, chosen)) <= set(map(str, full))


def test_command_refuses_what_is_not_there(capsys):
    assert run_tool(tools.bench, ["layouts", "--models", "bert"]) == 2
    assert "bert is not one of llama, gpt2, mpt" in capsys.readouterr().err
    assert run_tool(tools.bench, ["layouts", "--match", "p9"]) == 2
    assert "no layout has all these words" in capsys.readouterr().err
