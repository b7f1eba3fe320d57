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
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.config.errors import ConfigError
from megalm.parallel import collectives
from megalm.parallel.mesh import Axis

AnyBatch = TypeVar("AnyBatch")


# ------------------------------------------------------------------------------------------------------------- sharding
def zigzag_blocks(axis: Axis) -> tuple[int, int]:
    """The two of 2c blocks that this rank holds."""
    return axis.rank, 2 * axis.size - 1 - axis.rank


def zigzag_positions(length: int, axis: Axis, device: torch.device | str | None = None) -> Tensor:
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
    return torch.cat([torch.arange(b * block, (b + 1) * block, device=device) for b in zigzag_blocks(axis)])


def shard_sequence(tensor: Tensor, axis: Axis, dim: int = 1) -> Tensor:
    """This rank's part of a tensor whose dimension `dim` is the sequence. Shapes: [B, S] -> [B, S/c]"""
    if axis.size == 1:
        return tensor
    return tensor.index_select(dim, zigzag_positions(tensor.shape[dim], axis, tensor.device))


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
        positions = zigzag_positions(tokens.shape[1], axis, tokens.device)
        cut["positions"] = positions.expand(tokens.shape[0], -1)
    return replace(batch, **cut)  # type: ignore[type-var]


# ------------------------------------------------------------------------------------------------- attention of one blo
class _Plain:
    """Attention of query and key blocks with log-sum-exp, in matrix products that run anywhere.

    Shapes: q [B, h, Q, d], k and v [B, h, K, d], bias [1 or B, 1 or h, Q, K] or None -> out [B, h, Q, d], lse [B, h, Q] fp32
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = _scores(q, k, causal, bias, scale)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp_().to(v.dtype) @ v, lse

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (_scores(q, k, causal, bias, scale) - lse.unsqueeze(-1)).exp_()
        grad_v = weights.to(grad.dtype).transpose(-1, -2) @ grad
        inner = (grad.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = weights.mul_((grad @ v.transpose(-1, -2)).float() - inner).mul_(scale).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v


def _scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float().mul_(scale)
    if bias is not None:
        scores += bias
    if causal:
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(hidden, -torch.inf)
    return scores


class _CpuFlash:
    """The same through torch's CPU flash attention: no score matrix in memory."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_mask(q, k, bias), scale=scale
        )

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_mask(q, k, bias), scale=scale
        )


def _mask(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


class _CudaFlash:
    """The same through torch's flash attention for GPUs; bias must be None."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]

    @staticmethod
    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # a random state, and nothing is dropped
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused[:0], scale=scale
        )


def _kernel(q: Tensor, biased: bool) -> Any:
    """The fastest that serves: 16-bit heads of a size that flash attention knows, without bias, on a GPU."""
    if q.device.type == "cpu":
        return _CpuFlash if hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward") else _Plain
    flash = q.device.type == "cuda" and not torch.version.hip and q.dtype in (torch.float16, torch.bfloat16)
    return _CudaFlash if flash and not biased and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 else _Plain


# --------------------------------------------------------------------------------------------- pairs of blocks to be do
def _pairs(axis: Axis, source: int, causal: bool, block: int) -> Iterator[tuple[slice, slice, bool, int, int]]:
    """What this rank's queries do with the keys of axis rank `source`.

    Yields (queries, keys, causal within the pair, first query position, first key position); slices are of local rows.
    """
    mine = zigzag_blocks(axis)
    theirs = (source, 2 * axis.size - 1 - source)
    for i, query_block in enumerate(mine):
        for j, key_block in enumerate(theirs):
            if causal and key_block > query_block:
                continue
            rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            yield rows, columns, causal and key_block == query_block, query_block * block, key_block * block


# Added to scores that a document boundary hides. Finite, so that a query with no visible key in one pair of blocks has
# a finite log-sum-exp there; its weight in the whole is exp(-1e30 - lse) = 0, as every query sees at least itself.
_HIDDEN = {torch.float16: -3e4}
_HIDDEN_ELSE = -1e30


def _bias(
    slopes: Tensor | None, documents: Tensor | None, block: int, first_query: int, first_key: int, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores of a pair of blocks, [1 or B, 1 or h, block, block] fp32; None: nothing.

    slopes [h]: -slope x distance. documents [B, S]: a key of another document than the query's is hidden.
    """
    bias = None
    if slopes is not None:
        queries = torch.arange(first_query, first_query + block, device=slopes.device, dtype=torch.float32)
        keys = torch.arange(first_key, first_key + block, device=slopes.device, dtype=torch.float32)
        bias = (-slopes.float()[:, None, None] * (queries[:, None] - keys[None, :]).abs())[None]
    if documents is not None:
        of_queries = documents[:, None, first_query : first_query + block, None]
        of_keys = documents[:, None, None, first_key : first_key + block]
        hidden = _HIDDEN.get(dtype, _HIDDEN_ELSE)
        apart = (of_queries != of_keys).float().mul_(hidden)
        bias = apart if bias is None else bias + apart
    return bias


def _spread_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads so that there is one for each query head. Shapes: [B, g, S, d] -> [B, heads, S, d]"""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _collect_heads(grad: Tensor, groups: int) -> Tensor:
    """The backward of `_spread_heads`, in fp32."""
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


# ---------------------------------------------------------------------------------------------------------- whole atten
class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        documents: Tensor | None,
        axis: Axis,
        causal: bool,
        scale: float,
        mode: str,
    ) -> Tensor:
        heads_first = q.permute(1, 2, 0, 3)  # [B, h, S/c, d]
        block = q.shape[0] // 2
        kernel = _kernel(q, slopes is not None or documents is not None)
        merged = _Merge(heads_first)
        for source, pair in _visit(torch.stack([k, v]), axis, mode):
            keys, values = (_spread_heads(t.permute(1, 2, 0, 3), heads_first.shape[1]) for t in pair)
            for rows, columns, diagonal, first_query, first_key in _pairs(axis, source, causal, block):
                bias = _bias(slopes, documents, block, first_query, first_key, q.dtype)
                part = kernel.forward(
                    heads_first[:, :, rows], keys[:, :, columns], values[:, :, columns], diagonal, bias, scale
                )
                merged.add(rows, *part)
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, merged.lse, slopes, documents)
        ctx.axis, ctx.causal, ctx.scale, ctx.mode = axis, causal, scale, mode
        return out.permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse, slopes, documents = ctx.saved_tensors
        axis, causal, scale = ctx.axis, ctx.causal, ctx.scale
        grad = grad.permute(1, 2, 0, 3)
        q = q.permute(1, 2, 0, 3)
        block, heads, groups = q.shape[2] // 2, q.shape[1], k.shape[2]
        kernel = _kernel(q, slopes is not None or documents is not None)
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        carrier = _GradientCarrier(axis, ctx.mode)
        for source, pair in _visit(torch.stack([k, v]), axis, ctx.mode):
            keys, values = (_spread_heads(t.permute(1, 2, 0, 3), heads) for t in pair)
            grads = torch.zeros(2, q.shape[0], groups, q.shape[2], q.shape[3], dtype=torch.float32, device=q.device)
            for rows, columns, diagonal, first_query, first_key in _pairs(axis, source, causal, block):
                bias = _bias(slopes, documents, block, first_query, first_key, q.dtype)
                part_q, part_k, part_v = kernel.backward(
                    grad[:, :, rows],
                    q[:, :, rows],
                    keys[:, :, columns],
                    values[:, :, columns],
                    out[:, :, rows],
                    lse[:, :, rows],
                    diagonal,
                    bias,
                    scale,
                )
                grad_q[:, :, rows] += part_q
                grads[0, :, :, columns] += _collect_heads(part_k, groups)
                grads[1, :, :, columns] += _collect_heads(part_v, groups)
            carrier.add(source, grads)
        grad_k, grad_v = carrier.home().to(k.dtype).permute(0, 3, 1, 2, 4)
        return grad_q.to(q.dtype).permute(2, 0, 1, 3), grad_k, grad_v, None, None, None, None, None, None


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
    causal: bool,
    scale: float,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    mode: str = "ring",
) -> Tensor:
    """Attention over the whole sequence, of which each rank holds the zig-zag part; positions must already be in q
    and k (RoPE).

    Query head i uses key/value head i // (heads / kv_heads). alibi_slopes [heads]: -slope x distance is added to the
    scores. document_ids [B, S], of the whole sequence on every rank: a query sees the keys of its own document only.

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
    return _ContextAttention.apply(q, k, v, alibi_slopes, document_ids, axis, causal, scale, mode)
