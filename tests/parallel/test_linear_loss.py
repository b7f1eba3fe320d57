"""The loss in chunks of positions: that of the whole logits, on any layout, in whatever way its gradients travel."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from megalm.config import ParallelConfig
from megalm.parallel.collectives import count_bytes
from megalm.parallel.loss import vocabulary_parallel_linear_cross_entropy
from megalm.parallel.mesh import build_mesh
from tests.distributed import run_ranks
from tools.bench.layouts.layouts import Layout, compare, configure, merge, train, write_tokens

S, B, H = 8, 3, 12


def example(vocabulary):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(S, B, H, generator=generator), torch.randn(vocabulary, H, generator=generator)
    labels = torch.randint(0, vocabulary, (S, B), generator=generator)
    labels[0, 0], labels[3, 1] = -100, vocabulary
    mask = torch.rand(S, B, generator=generator)
    return hidden, weight, labels, mask


def losses(size, vocabulary, sequence, chunk):
    axis = build_mesh(ParallelConfig(tensor=size)).tensor
    hidden, weight, labels, mask = example(vocabulary)
    width = -(-vocabulary // size)
    padded = torch.full((width * size, H), 5.0)  # padding rows must not count, whatever they hold
    padded[:vocabulary] = weight
    local = padded.chunk(size)[axis.rank].clone().requires_grad_()
    part = (hidden.chunk(size)[axis.rank] if sequence else hidden).clone().requires_grad_()
    with count_bytes() as sent:
        total, each = vocabulary_parallel_linear_cross_entropy(
            part, local, labels, mask, axis, sequence_parallel=sequence, vocab_size=vocabulary, chunk=chunk, z_loss=0.01
        )
        assert not each.requires_grad
        (total * 0.5).backward()
    return total.detach(), each, part.grad, local.grad, sent.total


@pytest.mark.parametrize(("size", "sequence", "chunk"), [(2, False, 5), (4, True, 24), (2, True, 1)])
def test_on_ranks(size, sequence, chunk):
    vocabulary = 13
    hidden, weight, labels, mask = example(vocabulary)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits, counted = hidden @ weight.T, (labels >= 0) & (labels < vocabulary)
    plain = F.cross_entropy(logits.permute(0, 2, 1), labels.masked_fill(~counted, 0), reduction="none")
    plain = (plain + 0.01 * logits.logsumexp(-1) ** 2) * counted * mask.double()
    (plain.sum() * 0.5).backward()
    weights = F.pad(weight.grad, (0, 0, 0, -vocabulary % size)).chunk(size)
    for rank, (total, each, dhidden, dweight, sent) in enumerate(run_ranks(size, losses, size, 13, sequence, chunk)):
        torch.testing.assert_close(total.double(), plain.sum().detach(), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(each.double(), plain.detach(), rtol=1e-6, atol=1e-5)
        expected = hidden.grad.chunk(size)[rank] if sequence else hidden.grad
        torch.testing.assert_close(dhidden.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dweight.double(), weights[rank], rtol=1e-5, atol=1e-6)
        # hidden once in backward (and in forward, where it is gathered); a maximum and two sums of each position
        assert sent == pytest.approx((S * B * H * 4 + 3 * S * B * 4) * 2 * (size - 1) / size)


def body(config, folder: str, reference: dict):
    return compare(train(config, Path(folder) / str(dist.get_rank()), build_mesh(config.parallel)), reference)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama", Layout(tensor=2, sequence=True, zero_stage=1, recompute="full")),
        ("gpt2", Layout(pipeline=2, schedule="zb-h1")),  # tied weights; weight gradients put off
        ("llama", Layout(data=2, zero_stage=2)),
    ],
    ids=str,
)
def test_training_in_chunks_follows_all_logits_at_once(model, layout, tmp_path):
    tokens = write_tokens(tmp_path)
    whole = configure(model, Layout(), tokens)
    whole.parallel.loss_chunk = 0
    reference = train(whole, tmp_path / "one")
    chunks = configure(model, layout, tokens)
    chunks.parallel.loss_chunk = 7
    row = merge(model, layout, run_ranks(layout.world_size, body, chunks, str(tmp_path), reference))
    assert row["equal"], row


def test_how_many_positions_by_default():
    """All of them up to 512 MB of logits, then 64 MB, and at least 256 positions."""
    chosen = ParallelConfig().loss_positions
    assert chosen(2048, 32000, 4) == 2048
    assert chosen(2048, 131072, 4) == 256
    assert chosen(65536, 16384, 2) == 2048
    assert ParallelConfig(loss_chunk=0).loss_positions(9999, 10**6, 4) == 9999
    assert ParallelConfig(loss_chunk=100).loss_positions(60, 5, 4) == 60
