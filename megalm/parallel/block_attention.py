"""Attention of one block of queries and one of keys, with its log-sum-exp: what context parallelism puts together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megalm.ops.attention import Case, Cudnn, Flash, Flex, Inputs, Mask
from megalm.ops.attention_choice import AttentionChoice, compare_repeatedly

# Added to scores that a document boundary hides. Finite, so that a query with no visible key in one pair of blocks has
# a finite log-sum-exp there; its weight in the whole is exp(-1e30 - lse) = 0, as every query sees at least itself.
_HIDDEN = {torch.float16: -3e4}
_HIDDEN_ELSE = -1e30


@dataclass(frozen=True)
class Bounds:
    """What beside causality a query may see, and how far off things are, over the whole sequence.

    slopes [h]: -slope x distance is added. documents [B, S]: a key of another document than the query's is hidden.
    window: so is a key this far behind.
    """

    slopes: Tensor | None = None
    documents: Tensor | None = None
    window: int | None = None

    @property
    def kind(self) -> str:
        """As `Mask.kind`."""
        if self.slopes is not None:
            return "alibi"
        if self.documents is not None:
            return "documents"
        return "causal" if self.window is None else "window"


@dataclass(frozen=True)
class Pair:
    """A block of queries beside one of keys: rows of this rank's queries and of the keys that are here, where both begin in the
    whole sequence, and what the queries may see.

    diagonal: they are one block, and a query sees the keys up to itself; else all that the bounds let it see.
    """

    rows: slice
    columns: slice
    diagonal: bool
    first_query: int
    first_key: int
    bounds: Bounds

    @property
    def block(self) -> int:
        """Positions of each."""
        return int(self.rows.stop) - int(self.rows.start)

    def bias(self, q: Tensor) -> Tensor | None:
        """What is added to the scores beside causality, [1 or B, 1 or h, block, block] fp32; None: nothing."""
        bias, distance = None, None
        block, bounds = self.block, self.bounds
        cut = bounds.window is not None and self.first_query + block - 1 - self.first_key >= bounds.window
        if bounds.slopes is not None or cut:
            places = torch.arange(block, device=q.device, dtype=torch.float32)
            distance = (places + self.first_query)[:, None] - (places + self.first_key)[None, :]
        hidden = _HIDDEN.get(q.dtype, _HIDDEN_ELSE)
        if bounds.slopes is not None and distance is not None:
            bias = (-bounds.slopes.float()[:, None, None] * distance.abs())[None]
        if bounds.documents is not None:
            of_queries, of_keys = self._documents(bounds.documents)
            apart = (of_queries[:, None, :, None] != of_keys[:, None, None, :]).float().mul_(hidden)
            bias = apart if bias is None else bias + apart
        if cut and distance is not None and bounds.window is not None:
            far = (distance >= bounds.window).float().mul_(hidden)[None, None]
            bias = far if bias is None else bias + far
        return bias

    def mask(self, device: torch.device) -> Mask:
        """The same described, causality included; for causal attention, whose other pairs lie wholly behind their queries."""
        documents = query_documents = None
        if self.bounds.documents is not None:
            query_documents, documents = self._documents(self.bounds.documents)
        return Mask(
            self.block,
            device,
            seen=self.first_query - self.first_key,
            keys=self.block,
            window=self.bounds.window,
            documents=documents,
            query_documents=query_documents,
            slopes=self.bounds.slopes,
        )

    def _documents(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the queries and those of the keys."""
        queries = documents[:, self.first_query : self.first_query + self.block]
        return queries, documents[:, self.first_key : self.first_key + self.block]


@dataclass(frozen=True)
class Blocks:
    """A pair of blocks and what lies in them. Shapes: q [B, h, Q, d], k and v [B, h, K, d]"""

    pair: Pair
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class Row:
    """What backward is given of the queries' whole rows. Shapes: out and its gradient [B, h, Q, d], lse [B, h, Q] fp32"""

    grad: Tensor
    out: Tensor
    lse: Tensor


class BlockKernel(Protocol):
    """Attention of query and key blocks with log-sum-exp. Shapes: -> out [B, h, Q, d], lse [B, h, Q] fp32"""

    @property
    def name(self) -> str:
        """What it is called in ops.attention."""
        ...

    def why_not(self, case: Case) -> str | None:
        """Why it cannot serve the case here; None: it can."""
        ...

    def forward(self, call: Blocks) -> tuple[Tensor, Tensor]:
        """The block's own output and log-sum-exp."""
        ...

    def backward(self, call: Blocks, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        ...


class Scores:
    """Products that run anywhere, with the block's scores in memory; the others are compared with it."""

    name = "scores"

    def why_not(self, case: Case) -> str | None:
        return None

    def forward(self, call: Blocks) -> tuple[Tensor, Tensor]:
        scores, _ = self._scores(call)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp_().to(call.v.dtype) @ call.v, lse

    def backward(self, call: Blocks, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, grad = call.q, call.k, call.v, row.grad
        scores, bent = self._scores(call)
        weights = (scores - row.lse.unsqueeze(-1)).exp_()
        grad_v = weights.to(grad.dtype).transpose(-1, -2) @ grad
        inner = (grad.float() * row.out.float()).sum(-1, keepdim=True)
        grad_scores = weights.mul_((grad @ v.transpose(-1, -2)).float() - inner).mul_(call.scale)
        if bent is not None:
            grad_scores = grad_scores * (1 - bent.square())
        grad_scores = grad_scores.to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v

    @staticmethod
    def _scores(call: Blocks) -> tuple[Tensor, Tensor | None]:
        """Scores, and where they are capped the tanh in them."""
        q, k = call.q, call.k
        scores, bent = (q @ k.transpose(-1, -2)).float().mul_(call.scale), None
        if call.softcap is not None:
            bent = scores.div_(call.softcap).tanh_()
            scores = bent * call.softcap
        bias = call.pair.bias(q)
        if bias is not None:
            scores += bias
        if call.pair.diagonal:
            hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu_(1)
            scores.masked_fill_(hidden, -torch.inf)
        return scores, bent


class CpuFlash:
    """torch's CPU flash attention: no score matrix in memory."""

    name = "torch"

    def why_not(self, case: Case) -> str | None:
        if case.capped:
            return "it caps no scores"
        there = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
        return None if case.device == "cpu" and there else f"it is for CPUs, and this is {case.device}"

    def forward(self, call: Blocks) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            call.q, call.k, call.v, 0.0, call.pair.diagonal, attn_mask=self._mask(call), scale=call.scale
        )
        return out, lse

    def backward(self, call: Blocks, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        given = row.grad, call.q, call.k, call.v, row.out, row.lse
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, 0.0, call.pair.diagonal, attn_mask=self._mask(call), scale=call.scale
        )
        return grad_q, grad_k, grad_v

    @staticmethod
    def _mask(call: Blocks) -> Tensor | None:
        bias = call.pair.bias(call.q)
        return None if bias is None else bias.to(call.q.dtype).expand(*call.q.shape[:3], call.k.shape[2])


class CudaFlash:
    """torch's FlashAttention-2."""

    name = "flash"

    def why_not(self, case: Case) -> str | None:
        return Flash().why_not(case)

    def forward(self, call: Blocks) -> tuple[Tensor, Tensor]:
        made = torch.ops.aten._scaled_dot_product_flash_attention(
            call.q, call.k, call.v, 0.0, call.pair.diagonal, scale=call.scale
        )
        return made[0], made[1]

    def backward(self, call: Blocks, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.empty(2, dtype=torch.uint64, device=call.q.device)  # a random state, and nothing is dropped
        given = row.grad, call.q, call.k, call.v, row.out, row.lse
        lengths = call.q.shape[2], call.k.shape[2]
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *given, None, None, *lengths, 0.0, call.pair.diagonal, none, none[:0], scale=call.scale
        )
        return grad_q, grad_k, grad_v


class CudnnBlocks:
    """cuDNN's fused attention."""

    name = "cudnn"

    def why_not(self, case: Case) -> str | None:
        return Cudnn().why_not(case)

    def forward(self, call: Blocks) -> tuple[Tensor, Tensor]:
        made = torch.ops.aten._scaled_dot_product_cudnn_attention(
            call.q, call.k, call.v, None, True, 0.0, call.pair.diagonal, False, scale=call.scale
        )
        return made[0], made[1].reshape(call.q.shape[:3])

    def backward(self, call: Blocks, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros(1, dtype=torch.int64, device=call.q.device)
        given = row.grad, call.q, call.k, call.v, row.out, row.lse.unsqueeze(-1)
        lengths = call.q.shape[2], call.k.shape[2]
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *given, none, none, None, None, None, *lengths, 0.0, call.pair.diagonal, scale=call.scale
        )
        return grad_q, grad_k, grad_v


class FlexBlocks:
    """FlexAttention: windows, documents, ALiBi and caps without a block's scores in memory.

    Its backward knows the block's own log-sum-exp alone. The block is computed again, and what the whole row's makes of it goes
    through its output and its log-sum-exp: with w = exp(own lse - lse), d out_own = w grad, d lse_own = w grad (out_own - out).
    """

    name = "flex"

    def __init__(self, flex: Flex | None = None) -> None:
        self._flex = flex or Flex()

    def why_not(self, case: Case) -> str | None:
        return self._flex.why_not(case)

    def forward(self, call: Blocks) -> tuple[Tensor, Tensor]:
        out, lse = self._attend(call, call.q, call.k, call.v)
        return out, lse.clamp(min=_HIDDEN_ELSE)  # -inf where a query sees none of these keys

    def backward(self, call: Blocks, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (call.q, call.k, call.v))
            own, own_lse = self._attend(call, q, k, v)
        weight = (own_lse.detach() - row.lse).exp()
        grad_lse = weight * (row.grad.float() * (own.detach().float() - row.out.float())).sum(-1)
        grad_own = (weight.unsqueeze(-1) * row.grad.float()).to(own.dtype)
        grad_q, grad_k, grad_v = torch.autograd.grad([own, own_lse], [q, k, v], [grad_own, grad_lse])
        return grad_q, grad_k, grad_v

    def _attend(self, call: Blocks, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._flex.attend(Inputs(q, k, v, call.pair.mask(q.device), call.scale, call.softcap))


KERNELS: tuple[BlockKernel, ...] = (CudnnBlocks(), CudaFlash(), FlexBlocks(), CpuFlash(), Scores())


def choose_among_blocks(choice: AttentionChoice, kernels: Iterable[BlockKernel] = KERNELS) -> AttentionChoice:
    """What is wished for attention, for blocks of it."""
    return choice.among(kernels, try_blocks)


def describe_case(q: Tensor, bounds: Bounds, softcap: float | None) -> Case:
    """What decides which kernels serve blocks of these queries, [S, B, h, d]; keys have as many heads, and as wide ones."""
    heads, width = q.shape[2], q.shape[3]
    return Case(q.device.type, q.dtype, heads, heads, width, width, bounds.kind, softcap is not None, False)


def try_blocks(kernel: BlockKernel, case: Case, repeats: int, device: str | None = None) -> str | None:
    """As `try_kernel`: a pair on the diagonal and one behind it, given the log-sum-exp of a longer row."""
    device, block = device or case.device, 128
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, case.heads, block, case.head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator, device=device).to(case.dtype) for _ in range(4))
    documents = (torch.arange(2 * block, device=device) * 5 // (2 * block))[None].int()
    bounds = Bounds(
        torch.linspace(0.02, 0.5, case.heads, device=device) if case.mask == "alibi" else None,
        documents if case.mask == "documents" else None,
        block if case.mask == "window" else None,
    )
    scale, softcap = case.head_dim**-0.5, 30.0 if case.capped else None
    first, second = slice(0, block), slice(block, 2 * block)
    pairs = [Pair(second, second, True, block, block, bounds), Pair(second, first, False, block, 0, bounds)]
    calls = [Blocks(pair, q, k, v, scale, softcap) for pair in pairs]
    wide = [replace(call, q=q.float(), k=k.float(), v=v.float()) for call in calls]
    parts = [Scores().forward(call) for call in wide]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum((own * (own_lse - lse).exp().unsqueeze(-1) for own, own_lse in parts), torch.zeros_like(parts[0][0]))

    def compute(kernel: BlockKernel, call: Blocks) -> list[Tensor]:
        own, own_lse = kernel.forward(call)
        share = (own_lse.float() - lse).exp()
        row = Row(grad.to(call.q.dtype), out.to(call.q.dtype), lse)
        return [own.float() * share.unsqueeze(-1), share, *kernel.backward(call, row)]

    for call, reference in zip(calls, wide, strict=True):
        why = compare_repeatedly(
            partial(compute, kernel, call),
            partial(compute, Scores(), reference),
            ("output", "log-sum-exp", "dq", "dk", "dv"),
            1e-3 if case.dtype == torch.float32 else 3e-2,
            repeats,
        )
        if why is not None:
            return why
    return None
