"""The sides of the training benchmark train the same model: the same losses from the same weights."""

import math

import pytest
import torch

from tools.bench.__main__ import main
from tools.bench.train._plain import build_plain
from tools.bench.train._shapes import SHAPES
from tools.bench.train._sides import EXPERTS, Job, _our_step, _peer, compose_our_config, train_with_torch

SHAPE = {
    "num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 176, "vocab_size": 512, "seq_length": 64,
}  # fmt: skip


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "moe"])
def test_both_sides_have_the_same_losses(mixture, tmp_path):
    pytest.importorskip("transformers")
    job = Job(SHAPE, 2, "fp32", "cpu", torch.get_num_threads(), str(tmp_path), True, mixture)
    theirs, ours = train_with_torch(_peer(job), job, False), _our_step(job, "megalm")
    losses = [(float(theirs()), float(ours())) for _ in range(4)]
    assert losses[3][0] < losses[0][0] - 0.01
    assert all(a == pytest.approx(b, abs=2e-5) for a, b in losses)


def test_the_mixture_is_as_wide_as_the_dense_model_where_experts_are_chosen():
    job = Job(SHAPE, 2, "fp32", "cpu", 1, "", False, True)
    moe = compose_our_config(job).model.moe
    assert moe.num_experts == EXPERTS and moe.top_k * moe.ffn_hidden_size == SHAPE["ffn_hidden_size"]


def test_the_dense_side_stands_beside_a_mixture_only(capsys):
    assert main(["train", "--sides", "megalm-dense"]) == 2
    assert "add --model moe" in capsys.readouterr().err


def test_the_plain_llama_learns_its_batch_as_the_others_do():
    shape = SHAPES["tiny"]
    job = Job(shape, 2, "fp32", "cpu", 1, "", False)
    step = train_with_torch(build_plain(shape, "cpu"), job, False)
    losses = [float(step()) for _ in range(8)]
    assert losses[0] == pytest.approx(math.log(shape["vocab_size"]), rel=0.05) and losses[-1] < losses[0] - 0.1
