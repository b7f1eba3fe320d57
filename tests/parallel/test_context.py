"""Context-parallel attention against plain attention over the whole sequence."""

import pytest
import torch
from torch.nn import functional as F

from megalm.config import ConfigError, ParallelConfig
from megalm.data.batch import Batch
from megalm.parallel import context
from megalm.parallel.block_attention import CpuFlash, CudaFlash, Plain
from megalm.parallel.collectives import count_bytes
from megalm.parallel.mesh import Axis, build_mesh
from tests.distributed import run_ranks


def inputs(length, heads, groups, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    shapes = [(length, 2, heads, dim), (length, 2, groups, dim), (length, 2, groups, dim), (length, 2, heads, dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def slopes_of(heads, alibi):
    return torch.tensor([2.0 ** -(i + 1) for i in range(heads)]) if alibi else None


def documents_of(length, apart):
    """Documents of a few tokens and of half the sequence, other ones in each of the two sequences."""
    if not apart:
        return None
    ends = torch.tensor([[1, 3, length // 2], [5, length - 4, length - 1]])
    return (torch.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1).int()


def plain(length, heads, groups, dim, causal, alibi, apart=False, window=None, softcap=None, sinks=False):
    q, k, v, grad = (t.double() for t in inputs(length, heads, groups, dim))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    if sinks:
        leaves.append(sinks_of(heads).double().requires_grad_())
    q, k, v = (t.permute(1, 2, 0, 3) for t in leaves[:3])
    k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.3
    where = torch.arange(length)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if window:
        scores = scores.masked_fill(where[:, None] - where >= window, -torch.inf)
    if alibi:
        scores = scores - slopes_of(heads, True)[:, None, None] * (where[:, None] - where).abs()
    if causal:
        scores = scores.masked_fill(where[:, None] < where, -torch.inf)
    if apart:
        ids = documents_of(length, True)
        scores = scores.masked_fill((ids[:, :, None] != ids[:, None, :])[:, None], -torch.inf)
    if sinks:
        scores = torch.cat([scores, leaves[3][None, :, None, None].expand(2, heads, length, 1)], -1)
    out = (scores.softmax(-1)[..., :length] @ v).permute(2, 0, 1, 3)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def sinks_of(heads):
    return torch.linspace(-1.0, 2.0, heads)


def attend(context_size, cases):
    axis = build_mesh(ParallelConfig(context=context_size)).context
    results = []
    for length, heads, groups, dim, causal, alibi, apart, mode, dtype, *others in cases:
        window, softcap, sunk = others or (None, None, False)
        parts = [context.shard_sequence(t, axis, 0) for t in inputs(length, heads, groups, dim, dtype)]
        leaves = [t.requires_grad_() for t in parts[:3]]
        with count_bytes() as sent:
            slopes = slopes_of(heads, alibi)
            sinks = sinks_of(heads).to(dtype).requires_grad_() if sunk else None
            out = context.context_attention(
                *leaves,
                axis,
                causal=causal,
                scale=0.3,
                alibi_slopes=slopes,
                document_ids=documents_of(length, apart),
                window=window,
                softcap=softcap,
                sinks=sinks,
                mode=mode,
            )
            out.backward(parts[3])
        results.append(([out.detach(), *(leaf.grad for leaf in leaves)], sent.bytes, sinks.grad if sunk else None))
    return results


CASES = [
    (24, 4, 4, 8, True, False, False, "ring", torch.float32),
    (24, 4, 2, 8, True, False, False, "all_gather", torch.float32),
    (40, 6, 2, 5, True, True, False, "ring", torch.float32),
    (40, 3, 1, 5, True, True, False, "all_gather", torch.float32),
    (24, 2, 1, 7, False, False, False, "ring", torch.float32),
    (24, 2, 1, 7, True, False, False, "ring", torch.bfloat16),
    (40, 4, 2, 8, True, False, True, "ring", torch.float32),
    (40, 3, 1, 5, True, True, True, "all_gather", torch.float32),
    (24, 4, 2, 8, True, False, True, "ring", torch.bfloat16),
    (24, 4, 2, 8, True, True, True, "ring", torch.float16),
    (40, 4, 2, 8, True, False, False, "ring", torch.float32, 1, None, False),
    (40, 4, 2, 8, True, False, False, "ring", torch.float32, 7, None, True),
    (40, 4, 1, 8, True, False, True, "all_gather", torch.float32, 11, None, True),
    (40, 4, 4, 5, True, True, False, "ring", torch.float32, 13, None, False),
    (24, 3, 3, 8, True, False, True, "ring", torch.float32, 100, 0.7, False),
    (24, 3, 1, 8, True, False, False, "all_gather", torch.float32, 5, 0.7, True),
    (24, 4, 2, 8, True, False, False, "ring", torch.bfloat16, 9, None, True),
]


@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients_equal_plain_attention(size):
    results = run_ranks(size, attend, size, CASES)
    for number, (length, heads, groups, dim, causal, alibi, apart, _, dtype, *others) in enumerate(CASES):
        expected = plain(length, heads, groups, dim, causal, alibi, apart, *others)
        if others and others[2]:
            summed = sum(results[rank][number][2].double() for rank in range(size))
            tolerance = 1e-5 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(summed, expected.pop(), rtol=tolerance, atol=tolerance)
        for rank in range(size):
            axis = Axis("context", size, rank, tuple(range(size)))
            for ours, whole in zip(results[rank][number][0], expected, strict=True):
                assert ours.dtype == dtype
                tolerance = 1e-5 if dtype == torch.float32 else 0.05
                torch.testing.assert_close(
                    ours.double(), context.shard_sequence(whole, axis, 0), rtol=tolerance, atol=tolerance
                )


def test_bytes_on_the_ring_are_those_of_the_docstring():
    length, heads, groups, dim = 24, 4, 2, 8
    cases = [(length, heads, groups, dim, True, False, False, mode, torch.bfloat16) for mode in ("ring", "all_gather")]
    ring, gathered = (sent for _, sent, _ in run_ranks(4, attend, 4, cases)[1])
    pair = 2 * (length // 4) * 2 * groups * dim  # elements of k and v on one rank
    assert ring == {("send", "context"): 2 * (4 - 1) * pair * 2 + 4 * pair * 4}
    assert gathered == {("all_gather", "context"): 2 * 3 * pair * 2, ("reduce_scatter", "context"): 3 * pair * 4}


def test_the_plain_kernel_equals_the_cpu_flash_kernel():
    q, k, v, grad = (t.permute(1, 2, 0, 3) for t in inputs(16, 3, 3, 8))
    bias = context._Bounds(slopes_of(3, True), None, None).bias(16, 0, 0, q)
    apart = context._Bounds(None, documents_of(24, True)[:1], None).bias(16, 8, 0, q)  # every query sees some key
    for causal, extra in ((True, None), (False, None), (False, bias), (True, bias), (False, apart)):
        ours, flash = (kind.forward(q, k, v, causal, extra, 0.3) for kind in (Plain(), CpuFlash))
        torch.testing.assert_close(ours, tuple(flash))
        mine, theirs = (kind.backward(grad, q, k, v, *ours, causal, extra, 0.3) for kind in (Plain(), CpuFlash))
        torch.testing.assert_close(mine, tuple(theirs))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(Plain().forward(q, k, v, True, None, 0.3)[0], out)


def test_the_gpu_kernel_is_called_as_torch_declares_it():
    q, k, v, grad = (t.permute(1, 2, 0, 3).to("meta") for t in inputs(16, 3, 3, 8, torch.bfloat16))
    out, lse = CudaFlash.forward(q, k, v, True, None, 0.3)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)
    grads = CudaFlash.backward(grad, q, k, v, out, lse, True, None, 0.3)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_flash_kernel_equals_the_plain_one():
    q, k, v, grad = (t.permute(1, 2, 0, 3).contiguous().cuda() for t in inputs(96, 3, 3, 64, torch.bfloat16))
    assert context._kernel(q, False) is CudaFlash
    for causal in (True, False):
        expected = Plain().forward(q, k, v, causal, None, 0.3)
        flash = CudaFlash.forward(q, k, v, causal, None, 0.3)
        torch.testing.assert_close(flash, expected, rtol=0.02, atol=0.02)
        # the backward pass is given the whole sequence's log-sum-exp, which is larger than the block's own
        whole = expected[1] + 0.5
        torch.testing.assert_close(
            CudaFlash.backward(grad, q, k, v, *flash[:1], whole, causal, None, 0.3),
            context._Plain.backward(grad, q, k, v, *expected[:1], whole, causal, None, 0.3),
            rtol=0.05,
            atol=0.05,
        )


def test_zigzag_parts_cover_the_sequence_and_balance_causal_work():
    for size in (2, 3, 4, 8):
        axes = [Axis("context", size, rank, tuple(range(size))) for rank in range(size)]
        positions = [context.zigzag_positions(4 * size, axis) for axis in axes]
        assert sorted(torch.cat(positions).tolist()) == list(range(4 * size))
        assert len({int((p + 1).sum()) for p in positions}) == 1


def test_a_batch_is_cut_with_its_positions():
    axis = Axis("context", 2, 1, (0, 1))
    tokens = torch.arange(16).view(2, 8)
    part = context.shard_batch(Batch(tokens, tokens + 1, torch.ones(2, 8), document_ids=tokens.int()), axis)
    assert part.tokens.tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert part.labels.tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]]
    assert part.positions.tolist() == [[2, 3, 4, 5]] * 2
    assert part.loss_mask.shape == (2, 4)
    assert part.document_ids.shape == (2, 8)  # of every key, wherever it is


def test_what_cannot_be_cut_is_refused():
    axis = Axis("context", 2, 0, (0, 1))
    with pytest.raises(ConfigError, match="8, 12"):
        context.zigzag_positions(10, axis)
    with pytest.raises(ConfigError, match="ring, all_gather"):
        q = torch.zeros(4, 1, 1, 2)
        context.context_attention(q, q, q, axis, causal=True, scale=1.0, mode="tree")
