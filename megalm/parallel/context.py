"""Context parallelism: each rank holds a part of every sequence; attention exchanges keys and values.

The sequence is cut into 2c blocks, and rank r holds blocks r and 2c-1-r ("zig-zag"): with a causal mask every rank
then has the same work.

    c = 2:   rank 0: blocks 0 3    rank 1: blocks 1 2

    block of keys      0 1 2 3
    queries of block 0 \\
                     1 # \\
                     2 # # \\
                     3 # # # \\         \\ causal within the block   # whole block   rank 0: 2 \\ 3 #   rank 1: 2 \\ 3 #

Ring: keys and values travel around the ranks while the block that is here is used (Liu et al. 2023,
arXiv:2310.01889); partial outputs are merged by their log-sum-exp, so the result is exact. All-gather: the simple
alternative with more memory and no hiding.
Gradients of keys and values travel with them, in fp32, and return home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.config.errors import ConfigError
from megalm.ops.attention_choice import AttentionChoice
from megalm.parallel import collectives
from megalm.parallel.block_attention import BlockKernel, Blocks, Bounds, Pair, Row, choose_among_blocks, describe_case
from megalm.parallel.mesh import Axis

AnyBatch = TypeVar("AnyBatch")


# ------------------------------------------------------------------------------------------------------------- sharding
def number_zigzag_blocks(axis: Axis) -> tuple[int, int]:
    """The two of 2c blocks that this rank holds."""
    return axis.rank, 2 * axis.size - 1 - axis.rank


def number_zigzag_positions(length: int, axis: Axis, device: torch.device | str | None = None) -> Tensor:
    """Positions in the whole sequence of this rank's tokens, [S/c] int64. ConfigError if 2c does not divide the
    length."""
    if axis.size == 1:
        return torch.arange(length, device=device)
    block, rest = divmod(length, 2 * axis.size)
    if rest:
        lower = length - length % (2 * axis.size)
        raise ConfigError(
            f"a sequence of {length} tokens cannot be cut into 2 x {axis.size} equal blocks for parallel.context={axis.size}. "
            f"Lengths near it that can: {lower or 2 * axis.size}, {lower + 2 * axis.size}."
        )
    return torch.cat([torch.arange(b * block, (b + 1) * block, device=device) for b in number_zigzag_blocks(axis)])


def shard_sequence(tensor: Tensor, axis: Axis, dim: int = 1) -> Tensor:
    """This rank's part of a tensor whose dimension `dim` is the sequence. Shapes: [B, S] -> [B, S/c]"""
    if axis.size == 1:
        return tensor
    return tensor.index_select(dim, number_zigzag_positions(tensor.shape[dim], axis, tensor.device))


def shard_batch(batch: AnyBatch, axis: Axis) -> AnyBatch:
    """This rank's part of a Batch: every field that declares a `sequence` dim cut along it, positions filled in.

    What has a `whole_sequence` (document_ids) stays whole: this rank's queries are compared with the keys of every rank.
    """
    if axis.size == 1:
        return batch
    cut: dict[str, Any] = {}
    for field in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, field.name)
        dims = field.metadata["dims"]
        if value is not None and "sequence" in dims:
            cut[field.name] = shard_sequence(value, axis, dim=dims.index("sequence"))
    tokens = getattr(batch, "tokens")  # noqa: B009
    if getattr(batch, "positions", None) is None:
        positions = number_zigzag_positions(tokens.shape[1], axis, tokens.device)
        cut["positions"] = positions.expand(tokens.shape[0], -1)
    return replace(batch, **cut)  # type: ignore[type-var]


# --------------------------------------------------------------------------------------------- pairs of blocks to be do
def _pairs(axis: Axis, source: int, bounds: Bounds, block: int) -> Iterator[Pair]:
    """What this rank's queries do with the keys of axis rank `source`."""
    mine = number_zigzag_blocks(axis)
    theirs = (source, 2 * axis.size - 1 - source)
    for i, query_block in enumerate(mine):
        for j, key_block in enumerate(theirs):
            if key_block > query_block:
                continue
            if bounds.window is not None and (query_block - key_block - 1) * block + 1 >= bounds.window:
                continue  # the first query is that far behind the last key
            rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            yield Pair(rows, columns, key_block == query_block, query_block * block, key_block * block, bounds)


def _spread_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads so that there is one for each query head. Shapes: [B, g, S, d] -> [B, heads, S, d]"""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _collect_heads(grad: Tensor, groups: int) -> Tensor:
    """Collect the backward of `_spread_heads`, in fp32."""
    grad = grad.float()
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)


class _Merge:
    """Sum of partial attentions: out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i), in fp32."""

    def __init__(self, q: Tensor) -> None:
        self.out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        self.lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        before = self.lse[:, :, rows]
        total = torch.logaddexp(before, lse)
        old = (before - total).exp_().unsqueeze(-1)
        new = (lse - total).exp_().unsqueeze(-1)
        self.out[:, :, rows] = self.out[:, :, rows].mul_(old).add_(out * new)
        self.lse[:, :, rows] = total

    def add_sinks(self, sinks: Tensor) -> None:
        """Scores [h] without a value."""
        total = torch.logaddexp(self.lse, sinks.float()[None, :, None])
        self.out.mul_((self.lse - total).exp_().unsqueeze(-1))
        self.lse = total


# ---------------------------------------------------------------------------------------------------------- whole atten
@dataclass(frozen=True)
class _Options:
    axis: Axis
    scale: float
    softcap: float | None
    bounds: Bounds
    kernel: BlockKernel
    mode: str

    def pairs(self, source: int, block: int) -> Iterator[Pair]:
        """What this rank's queries do with the keys of axis rank `source`."""
        return _pairs(self.axis, source, self.bounds, block)

    def blocks(self, pair: Pair, q: Tensor, k: Tensor, v: Tensor) -> Blocks:
        """What lies in a pair, of all this rank's queries and all keys that are here."""
        rows, columns = pair.rows, pair.columns
        return Blocks(pair, q[:, :, rows], k[:, :, columns], v[:, :, columns], self.scale, self.softcap)


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        options: _Options,
    ) -> Tensor:
        heads_first = q.permute(1, 2, 0, 3)  # [B, h, S/c, d]
        block = q.shape[0] // 2
        axis, mode, kernel = options.axis, options.mode, options.kernel
        merged = _Merge(heads_first)
        for source, pair in _visit(torch.stack([k, v]), axis, mode):
            keys, values = (_spread_heads(t.permute(1, 2, 0, 3), heads_first.shape[1]) for t in pair)
            for each in options.pairs(source, block):
                merged.add(each.rows, *kernel.forward(options.blocks(each, heads_first, keys, values)))
        if sinks is not None:
            merged.add_sinks(sinks)
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, merged.lse, sinks)
        ctx.options = options
        return out.permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        options: _Options = ctx.options
        axis, mode, kernel = options.axis, options.mode, options.kernel
        grad = grad.permute(1, 2, 0, 3)
        q = q.permute(1, 2, 0, 3)
        block, heads, groups = q.shape[2] // 2, q.shape[1], k.shape[2]
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        carrier = _GradientCarrier(axis, mode)
        for source, pair in _visit(torch.stack([k, v]), axis, mode):
            keys, values = (_spread_heads(t.permute(1, 2, 0, 3), heads) for t in pair)
            grads = torch.zeros(2, q.shape[0], groups, q.shape[2], q.shape[3], dtype=torch.float32, device=q.device)
            for each in options.pairs(source, block):
                rows, columns = each.rows, each.columns
                row = Row(grad[:, :, rows], out[:, :, rows], lse[:, :, rows])
                part_q, part_k, part_v = kernel.backward(options.blocks(each, q, keys, values), row)
                grad_q[:, :, rows] += part_q
                grads[0, :, :, columns] += _collect_heads(part_k, groups)
                grads[1, :, :, columns] += _collect_heads(part_v, groups)
            carrier.add(source, grads)
        grad_k, grad_v = carrier.home().to(k.dtype).permute(0, 3, 1, 2, 4)
        grad_sinks = None
        if sinks is not None:  # a sink's share of the softmax is paid by the others, and it has no value
            shares = (sinks.float()[None, :, None] - lse).exp()
            grad_sinks = -(shares * (grad.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return grad_q.to(q.dtype).permute(2, 0, 1, 3), grad_k, grad_v, grad_sinks, None


def _visit(own: Tensor, axis: Axis, mode: str) -> Iterator[tuple[int, Tensor]]:
    """Every rank's keys and values, as (axis rank, tensor like `own`), own first.

    ring: those of the next rank arrive while the caller works on the ones it was given.
    """
    if mode == "all_gather":
        everything = collectives.all_gather(own.unsqueeze(0), axis)
        for step in range(axis.size):
            source = (axis.rank - step) % axis.size
            yield source, everything[source]
        return
    here = own
    for step in range(axis.size):
        arriving: Callable[[], list[Tensor]] | None = None
        if step + 1 < axis.size:
            arriving = collectives.exchange_async([here], axis, *_neighbours(axis))
        yield (axis.rank - step) % axis.size, here
        if arriving is not None:
            here = arriving()[0]


def _neighbours(axis: Axis) -> tuple[int, int]:
    """(to whom, from whom) things travel around the ring."""
    return (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size


class _GradientCarrier:
    """Brings the gradients of keys and values home: around the ring one step behind them, or by a reduce-scatter."""

    def __init__(self, axis: Axis, mode: str) -> None:
        self.axis, self.mode = axis, mode
        self.arriving: Callable[[], list[Tensor]] | None = None
        self.parts: dict[int, Tensor] = {}

    def add(self, source: int, grads: Tensor) -> None:
        if self.mode == "all_gather":
            self.parts[source] = grads
            return
        if self.arriving is not None:
            grads = self.arriving()[0].add_(grads)
        self.arriving = collectives.exchange_async([grads], self.axis, *_neighbours(self.axis))

    def home(self) -> Tensor:
        if self.mode == "all_gather":
            return collectives.reduce_scatter(torch.stack([self.parts[s] for s in range(self.axis.size)]), self.axis)[0]
        assert self.arriving is not None
        return self.arriving()[0]


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axis: Axis,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernels: AttentionChoice | None = None,
    mode: str = "ring",
) -> Tensor:
    """Causal attention over the whole sequence, of which each rank holds the zig-zag part; positions must already be in q
    and k (RoPE).

    Query head i uses key/value head i // (heads / kv_heads). alibi_slopes [heads]: -slope x distance is added to the
    scores. document_ids [B, S], of the whole sequence on every rank: a query sees the keys of its own document only.
    window: and no key that is this far behind. softcap: scores become softcap x tanh(score / softcap). sinks [heads]: a
    score of each head that takes part in the softmax, without a value; its gradient is of this rank's tokens.
    kernels: chooses what computes a pair of blocks (`choose_among_blocks`).

    Shapes: q [S/c, B, heads, d], k and v [S/c, B, kv_heads, d] -> [S/c, B, heads, d]
    Comm:   ring: forward c-1 exchanges of (k, v), backward c-1 of (k, v) and c of their fp32 gradients;
            all_gather: forward and backward all-gather of (k, v), backward reduce-scatter of their fp32 gradients
    Source: Liu et al. 2023 (Ring Attention, arXiv:2310.01889); zig-zag balance: Brandon et al. 2023 (arXiv:2311.09431)
    Errors: ConfigError for a local length that is odd, or an unknown mode.
    """
    if mode not in ("ring", "all_gather"):
        raise ConfigError(f"parallel.context_mode={mode}: not one of ring, all_gather.")
    if q.shape[0] % 2:
        raise ConfigError(
            f"each of {axis.size} context ranks must hold two equal blocks, and {q.shape[0]} tokens are odd: "
            f"choose model.seq_length divisible by {2 * axis.size}."
        )
    bounds = Bounds(alibi_slopes, document_ids, window)
    kernel = (kernels or choose_among_blocks(AttentionChoice())).choose(describe_case(q, bounds, softcap)).kernel
    options = _Options(axis, scale, softcap, bounds, kernel, mode)
    return _ContextAttention.apply(q, k, v, sinks, options)
