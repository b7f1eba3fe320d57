"""Context-parallel attention against plain attention over the whole sequence."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from megalm.config import ConfigError, ParallelConfig
from megalm.data.batch import Batch
from megalm.ops.attention import Case
from megalm.ops.attention_choice import AttentionChoice
from megalm.parallel import context
from megalm.parallel.block_attention import (
    Blocks,
    Bounds,
    CpuFlash,
    CudaFlash,
    CudnnBlocks,
    FlexBlocks,
    Pair,
    Row,
    Scores,
    choose_among_blocks,
    try_blocks,
)
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


def plain(length, heads, groups, dim, alibi, apart=False, window=None, softcap=None, sinks=False):
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
    for length, heads, groups, dim, alibi, apart, mode, dtype, *others in cases:
        window, softcap, sunk = others or (None, None, False)
        parts = [context.shard_sequence(t, axis, 0) for t in inputs(length, heads, groups, dim, dtype)]
        leaves = [t.requires_grad_() for t in parts[:3]]
        with count_bytes() as sent:
            slopes = slopes_of(heads, alibi)
            sinks = sinks_of(heads).to(dtype).requires_grad_() if sunk else None
            out = context.context_attention(
                *leaves,
                axis,
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
    (24, 4, 4, 8, False, False, "ring", torch.float32),
    (24, 4, 2, 8, False, False, "all_gather", torch.float32),
    (40, 6, 2, 5, True, False, "ring", torch.float32),
    (40, 3, 1, 5, True, False, "all_gather", torch.float32),
    (24, 2, 1, 7, False, False, "ring", torch.bfloat16),
    (40, 4, 2, 8, False, True, "ring", torch.float32),
    (40, 3, 1, 5, True, True, "all_gather", torch.float32),
    (24, 4, 2, 8, False, True, "ring", torch.bfloat16),
    (24, 4, 2, 8, True, True, "ring", torch.float16),
    (40, 4, 2, 8, False, False, "ring", torch.float32, 1, None, False),
    (40, 4, 2, 8, False, False, "ring", torch.float32, 7, None, True),
    (40, 4, 1, 8, False, True, "all_gather", torch.float32, 11, None, True),
    (40, 4, 4, 5, True, False, "ring", torch.float32, 13, None, False),
    (24, 3, 3, 8, False, True, "ring", torch.float32, 100, 0.7, False),
    (24, 3, 1, 8, False, False, "all_gather", torch.float32, 5, 0.7, True),
    (24, 4, 2, 8, False, False, "ring", torch.bfloat16, 9, None, True),
]


@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients_equal_plain_attention(size):
    results = run_ranks(size, attend, size, CASES)
    for number, (length, heads, groups, dim, alibi, apart, _, dtype, *others) in enumerate(CASES):
        expected = plain(length, heads, groups, dim, alibi, apart, *others)
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
    cases = [(length, heads, groups, dim, False, False, mode, torch.bfloat16) for mode in ("ring", "all_gather")]
    ring, gathered = (sent for _, sent, _ in run_ranks(4, attend, 4, cases)[1])
    pair = 2 * (length // 4) * 2 * groups * dim  # elements of k and v on one rank
    assert ring == {("send", "context"): 2 * (4 - 1) * pair * 2 + 4 * pair * 4}
    assert gathered == {("all_gather", "context"): 2 * 3 * pair * 2, ("reduce_scatter", "context"): 3 * pair * 4}


def pair_of(first_query, first_key, **bounds):
    """16 queries and 16 keys."""
    whole = slice(0, 16)
    return Pair(whole, whole, first_query == first_key, first_query, first_key, Bounds(**bounds))


PAIRS = {
    "diagonal": pair_of(16, 16),
    "behind": pair_of(16, 0),
    "alibi": pair_of(16, 0, slopes=slopes_of(3, True)),
    "alibi diagonal": pair_of(0, 0, slopes=slopes_of(3, True)),
    "documents": pair_of(16, 0, documents=torch.tensor([[0] * 5 + [1] * 27])),
    "documents diagonal": pair_of(8, 8, documents=documents_of(24, True)[:1]),
    "window": pair_of(16, 0, window=40),
    "window diagonal": pair_of(16, 16, window=5),
    "all": pair_of(8, 8, slopes=slopes_of(3, True), documents=documents_of(24, True)[1:], window=6),
}


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention's dense form, which runs on a CPU, and there refuses gradients unless it is told not to."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    return FlexBlocks()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kind", ["torch", "flex"])
def test_a_pair_of_blocks_is_that_of_plain_products(name, softcap, kind, flex):
    """Output, log-sum-exp, and gradients given those of a longer row."""
    kernel = {"torch": CpuFlash(), "flex": flex}[kind]
    if kind == "torch" and softcap is not None:
        return
    q, k, v, grad = (t[:, :1].permute(1, 2, 0, 3) for t in inputs(16, 3, 3, 8))
    call = Blocks(PAIRS[name], q, k, v, 0.3, softcap)
    own, lse = Scores().forward(call)
    torch.testing.assert_close(tuple(kernel.forward(call)), (own, lse), rtol=1e-4, atol=1e-5)
    row = Row(grad, own * 0.6 + 0.1, lse + 0.5)
    torch.testing.assert_close(kernel.backward(call, row), Scores().backward(call, row), rtol=1e-4, atol=1e-5)


def test_keys_of_other_documents_alone_have_no_weight_in_the_whole(flex):
    q, k, v, grad = (t[:, :1].permute(1, 2, 0, 3) for t in inputs(16, 3, 3, 8))
    pair = pair_of(16, 0, documents=torch.tensor([[0] * 16 + [1] * 16]))
    call = Blocks(pair, q, k, v, 0.3)
    for kernel in (flex, Scores()):
        own, own_lse = kernel.forward(call)
        assert own.isfinite().all() and bool((own_lse < -1e29).all())
        for gradient in kernel.backward(call, Row(grad, own, torch.zeros(1, 3, 16))):
            assert bool((gradient == 0).all())


def test_scores_are_right_themselves():
    q, k, v, _ = (t.permute(1, 2, 0, 3) for t in inputs(16, 3, 3, 8))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(Scores().forward(Blocks(pair_of(0, 0), q, k, v, 0.3))[0], out)


@pytest.mark.parametrize("kernel", [CudaFlash(), CudnnBlocks()], ids=lambda kernel: kernel.name)
def test_the_gpus_kernels_are_called_as_torch_declares_them(kernel):
    q, k, v, grad = (t.permute(1, 2, 0, 3).to("meta") for t in inputs(16, 3, 3, 8, torch.bfloat16))
    call = Blocks(pair_of(0, 0), q, k, v, 0.3)
    out, lse = kernel.forward(call)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)
    grads = kernel.backward(call, Row(grad, out, lse))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("mask", ["causal", "window", "documents", "alibi"])
def test_a_kernel_of_blocks_is_tried_on_a_long_row(mask, flex):
    case = Case("cpu", torch.float32, 3, 3, 16, 16, mask, False, False)
    for kernel in (Scores(), CpuFlash(), flex):
        assert try_blocks(kernel, case, repeats=2) is None, kernel.name

    class Off(CpuFlash):
        def backward(self, call, row):
            grads = super().backward(call, row)
            return (*grads[:2], grads[2] * 1.1)

    assert "dv is 1.0e-01" in try_blocks(Off(), case, repeats=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mask", ["causal", "window", "documents", "alibi"])
def test_on_a_gpu_blocks_keep_no_scores(mask):
    case = Case("cuda", torch.bfloat16, 3, 3, 64, 64, mask, False, False)
    assert choose_among_blocks(AttentionChoice("auto", "strict")).choose(case).kernel.name != "scores"


def test_zigzag_parts_cover_the_sequence_and_balance_causal_work():
    for size in (2, 3, 4, 8):
        axes = [Axis("context", size, rank, tuple(range(size))) for rank in range(size)]
        positions = [context.number_zigzag_positions(4 * size, axis) for axis in axes]
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
        context.number_zigzag_positions(10, axis)
    with pytest.raises(ConfigError, match="ring, all_gather"):
        q = torch.zeros(4, 1, 1, 2)
        context.context_attention(q, q, q, axis, scale=1.0, mode="tree")
