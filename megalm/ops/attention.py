"""Softmax attention: what a query sees, and the kernels that compute it.

Which kernel serves is chosen by `megalm.ops.attention_choice`; all of them compute what `Scores` does in plain products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

_ALIGNED = 8
"""Features that sinks add to a head: one is needed, and kernels want multiples of 8."""
_FLEX_BLOCK = 128
"""Queries and keys of a block that FlexAttention leaves out, or computes whole."""


class Mask:
    """What each query sees, and how far off things are: described, so that a kernel that knows windows and documents needs no
    matrix of them, and drawn once for those that do.

    The first query stands `seen` positions behind the first key. A query sees the positions before it and its own; window: so
    many of them; documents: those of its own document; slopes [A]: -slope x distance is added to the scores.
    keys: how many there are; None: up to the last query. documents [B, K] of the keys, and of the queries where these are not the
    last of them, query_documents [B, Q].
    """

    def __init__(
        self,
        queries: int,
        device: torch.device | str,
        *,
        seen: int = 0,
        window: int | None = None,
        documents: Tensor | None = None,
        slopes: Tensor | None = None,
        keys: int | None = None,
        query_documents: Tensor | None = None,
    ) -> None:
        self.queries, self.keys, self.seen = queries, seen + queries if keys is None else keys, seen
        self.device = torch.device(device)
        self.window = window if window is not None and window < seen + queries else None
        self.documents, self.slopes = documents, slopes
        self.query_documents = (
            documents[:, seen:] if documents is not None and query_documents is None else query_documents
        )
        self._drawn: dict[torch.dtype, Tensor] = {}
        self._visible: Tensor | None = None
        self._blocks: Any = None

    def last(self, keys: int) -> Mask:
        """The same for the last of the keys: a cache may have forgotten those that no window reaches."""
        if keys == self.keys:
            return self
        documents = None if self.documents is None else self.documents[:, -keys:]
        seen = keys - self.queries
        return Mask(self.queries, self.device, seen=seen, window=self.window, documents=documents, slopes=self.slopes)

    @property
    def kind(self) -> str:
        """causal: all that is behind a query; cached: so, of more keys than queries; else what there is beside it."""
        if self.slopes is not None:
            return "alibi"
        if self.documents is not None:
            return "documents"
        if self.window is not None:
            return "window"
        return "cached" if self.seen else "causal"

    def visible(self) -> Tensor | None:
        """Which keys the queries see, bool [1 or B, 1, Q, K] or [Q, K]; None: all that are behind them, of as many keys."""
        if self._visible is None and (self.seen or self.window is not None or self.documents is not None):
            keys = torch.arange(self.keys, device=self.device)
            distance = self._query_positions()[:, None] - keys
            band = distance >= 0
            if self.window is not None:
                band &= distance < self.window
            if self.documents is not None and self.query_documents is not None:
                band = (self.query_documents[:, None, :, None] == self.documents[:, None, None, :]) & band
            self._visible = band
        return self._visible

    def draw(self, dtype: torch.dtype) -> Tensor | None:
        """Draw the mask as torch's attention takes it, bool or to be added to the scores; None where causality says it all."""
        if self.slopes is None:
            return self.visible()
        drawn = self._drawn.get(dtype)
        if drawn is None:
            keys = torch.arange(self.keys, device=self.device)
            drawn = draw_alibi(self.slopes, self._query_positions(), keys, dtype)
            band = self.visible()
            if band is not None:
                drawn = drawn.masked_fill(~band, -torch.inf)
            self._drawn[dtype] = drawn
        return drawn

    def _query_positions(self) -> Tensor:
        return torch.arange(self.seen, self.seen + self.queries, device=self.device)

    def blocks(self) -> Any:
        """What FlexAttention leaves out: blocks without a visible key are not computed."""
        if self._blocks is None:
            rows = self.documents.shape[0] if self.documents is not None else None
            make = _compiled_blocks() if self.device.type == "cuda" else flex_attention.create_block_mask
            self._blocks = make(
                self._judge(), rows, None, self.queries, self.keys, device=self.device, BLOCK_SIZE=_FLEX_BLOCK
            )
        return self._blocks

    def _judge(self) -> Callable[..., Tensor]:
        """Whether a query sees a key, as FlexAttention asks it: a function of indices, which it compiles."""
        seen, window = self.seen, self.window
        documents, query_documents = self.documents, self.query_documents

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = query + seen
            visible = position >= key
            if window is not None:
                visible = visible & (position - key < window)
            if documents is not None and query_documents is not None:
                visible = visible & (query_documents[row, query] == documents[row, key])
            return visible

        return sees

    def change_scores(self, softcap: float | None) -> Callable[..., Tensor] | None:
        """How FlexAttention changes a score; None: it does not."""
        slopes, seen = self.slopes, self.seen
        if softcap is None and slopes is None:
            return None

        def change(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if slopes is not None:
                score = score - slopes[head] * (query + seen - key)
            return score

        return change


def draw_alibi(slopes: Tensor, query_positions: Tensor, key_positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask: -slope x distance, and -inf for keys after their query.

    Shapes:  slopes [A], query_positions [Q], key_positions [K] -> [A, Q, K]
    """
    distance = query_positions[:, None] - key_positions[None, :]
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, float("-inf")).to(dtype)


@dataclass(frozen=True)
class Case:
    """What decides which kernels serve a layer's attention."""

    device: str
    dtype: torch.dtype
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    mask: str
    """`Mask.kind`."""
    capped: bool
    sinks: bool

    @property
    def width(self) -> int:
        """Features of a head where queries, keys and values must have as many, and a sink is one of them."""
        return max(self.head_dim, self.value_dim) + (_ALIGNED if self.sinks else 0)

    def __str__(self) -> str:
        widths = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        extras = ", capped scores" * self.capped + ", sinks" * self.sinks
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.mask}, {dtype}, {self.heads}/{self.groups} heads of {widths}{extras}"


@dataclass(frozen=True)
class Inputs:
    """One call of attention. Shapes: q [B, A, S, d], k [B, G, K, d], v [B, G, K, e], sinks [A]; A a multiple of G"""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def case(self) -> Case:
        """What decides which kernels serve."""
        return Case(
            self.q.device.type,
            self.q.dtype,
            self.q.shape[1],
            self.k.shape[1],
            self.q.shape[3],
            self.v.shape[3],
            self.mask.kind,
            self.softcap is not None,
            self.sinks is not None,
        )


class Kernel(Protocol):
    """A way to compute attention on some machines, for some cases."""

    name: str

    def why_not(self, case: Case) -> str | None:
        """Why it cannot serve the case here; None: it can."""
        ...

    def __call__(self, call: Inputs) -> Tensor:
        """softmax(cap(scale q k^T) + bias) v, a sink's share thrown away. Shapes: -> [B, A, S, e]"""
        ...


class Scores:
    """Attention with its scores in memory, in fp32: serves anything anywhere, and is what the others are compared with."""

    name = "scores"

    def why_not(self, case: Case) -> str | None:
        return None

    def __call__(self, call: Inputs) -> Tensor:
        q, k, v, mask, sinks = call.q, call.k, call.v, call.mask.draw(torch.float32), call.sinks
        repeats = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (k, v))
        if call.softcap is not None:
            scores = call.softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (call.scale / call.softcap))
        else:
            scores = (q @ k.transpose(-1, -2)).float() * call.scale
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype)
        return weights @ v


class Torch:
    """torch's scaled_dot_product_attention, whatever it takes: on a CPU its flash attention."""

    name = "torch"
    backend: ClassVar[SDPBackend | None] = None
    groups = True
    """Whether it takes fewer key heads than query heads."""

    def why_not(self, case: Case) -> str | None:
        return "it caps no scores" if case.capped else None

    def __call__(self, call: Inputs) -> Tensor:
        q, k, v, mask, sinks = call.q, call.k, call.v, call.mask.draw(call.q.dtype), call.sinks
        queries, values = q.shape[2], v.shape[-1]
        q, k, v = widen(q, k, v)
        if sinks is not None:
            q, k, v, mask = _add_sinks(q, k, v, mask, call.scale, sinks)
        grouped = q.shape[1] != k.shape[1]
        if grouped and not self.groups:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            grouped = False
        return self._attend(q, k, v, mask, grouped, call.scale)[:, :, -queries:, :values]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, scale=scale
        )


class _OnGpu(Torch):
    """One of the kernels behind scaled_dot_product_attention."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool, scale: float) -> Tensor:
        assert self.backend is not None
        with sdpa_kernel(self.backend):
            return super()._attend(q, k, v, mask, grouped, scale)

    def why_not(self, case: Case) -> str | None:
        if case.device != "cuda":
            return f"it is for CUDA devices, and this is {case.device}"
        return super().why_not(case)


class _Narrow(_OnGpu):
    """A kernel of 16 bits that knows causality and no other mask."""

    widest: ClassVar[int]

    def why_not(self, case: Case) -> str | None:
        why = super().why_not(case)
        if why is not None:
            return why
        if case.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in 16 bits, and this is {str(case.dtype).removeprefix('torch.')}"
        if case.mask != "causal":
            return f"it knows causality alone, and this is {case.mask}"
        if case.width % 8 or case.width > self.widest:
            return f"a head of {case.width} features: it takes multiples of 8 up to {self.widest}"
        return None


class Cudnn(_Narrow):
    """cuDNN's fused attention: the fastest on Hopper, and not deterministic in backward."""

    name, backend, widest = "cudnn", SDPBackend.CUDNN_ATTENTION, 128


class Flash(_Narrow):
    """FlashAttention-2, as torch brings it (Dao 2023, arXiv:2307.08691)."""

    name, backend, widest = "flash", SDPBackend.FLASH_ATTENTION, 256


class Efficient(_OnGpu):
    """The memory-efficient kernel (Rabe and Staats 2021, arXiv:2112.05682): any mask and fp32, over the full square."""

    name, backend, groups = "efficient", SDPBackend.EFFICIENT_ATTENTION, False


class InstalledFlash(_Narrow):
    """FlashAttention-3 or -4, from a package that registers itself with torch; then torch's flash attention is that one."""

    backend, widest = SDPBackend.FLASH_ATTENTION, 256

    def __init__(self, version: str) -> None:
        self.name, self.version = version.lower(), version

    def why_not(self, case: Case) -> str | None:
        why = super().why_not(case)
        return why if why is not None else _activate(self.version)


@cache
def _activate(version: str) -> str | None:
    """Let torch's flash attention be this one, for the whole process. Returns why that failed."""
    try:
        from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls

        if version not in list_flash_attention_impls():
            return f"this torch knows no {version}"
        activate_flash_attention_impl(version)
    except Exception as error:  # whatever an optional package does when it is imported
        return f"{version} cannot be used: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


class Flex:
    """FlexAttention (Dong et al. 2024, arXiv:2412.05496): masks by blocks, groups and caps, compiled by Triton."""

    name = "flex"

    def why_not(self, case: Case) -> str | None:
        if case.device != "cuda":
            return f"it is compiled for CUDA devices, and this is {case.device}"
        if case.mask == "cached":
            return "with a cache every length would be compiled anew"
        if case.head_dim < 16 or case.value_dim < 16:
            return f"a head of {min(case.head_dim, case.value_dim)} features: it takes 16 and more"
        return None if _has_triton() else "Triton is not installed"

    def __call__(self, call: Inputs) -> Tensor:
        out, lse = self.attend(call)
        if call.sinks is None:
            return out
        # A sink takes its share of the softmax: exp(lse) / (exp(lse) + exp(sink)) is left.
        share = torch.sigmoid(lse - call.sinks.float()[None, :, None])
        return (out * share.unsqueeze(-1)).to(out.dtype)

    def attend(self, call: Inputs) -> tuple[Tensor, Tensor]:
        """Without sinks. Shapes: -> [B, A, S, e], log-sum-exp of the scores [B, A, S] fp32"""
        run = _compiled_flex() if call.q.is_cuda else flex_attention.flex_attention
        out, aux = run(
            call.q,
            call.k,
            call.v,
            score_mod=call.mask.change_scores(call.softcap),
            block_mask=call.mask.blocks(),
            scale=call.scale,
            enable_gqa=call.q.shape[1] != call.k.shape[1],
            kernel_options=_flex_options() if call.q.is_cuda else None,
            return_aux=flex_attention.AuxRequest(lse=True),
        )
        return out, aux.lse


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention.flex_attention, dynamic=False)


@lru_cache(maxsize=1)
def _compiled_blocks() -> Any:
    return torch.compile(flex_attention.create_block_mask, dynamic=False)


@lru_cache(maxsize=1)
def _flex_options() -> dict[str, Any] | None:
    """Triton's own kernel, which torch calls deterministic, where this torch has another one beside it."""
    options = getattr(flex_attention, "FlexKernelOptions", None)
    return {"BACKEND": "TRITON"} if "BACKEND" in getattr(options, "__annotations__", {}) else None


def widen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give values and keys one width, by zeros that change nothing: fused kernels know only one."""
    width = max(k.shape[-1], v.shape[-1])
    q, k, v = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    return q, k, v


def _add_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Put a key before the others whose score is the head's sink, and whose value is 0; any kernel then serves.

    Heads get further features: the sink in the query, 1 in the key before all others and 0 in the rest. Where causality
    needs no mask it needs none then either: a query without meaning goes before the others.
    """
    batch, heads, queries, _ = q.shape
    shift = (sinks / scale).to(q.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
    q = torch.cat([q, F.pad(shift, (0, _ALIGNED - 1))], -1)
    first = F.pad(k.new_ones(1), (k.shape[-1], _ALIGNED - 1)).expand(batch, k.shape[1], 1, -1)
    k = torch.cat([first, F.pad(k, (0, _ALIGNED))], 2)
    v = F.pad(v, (0, _ALIGNED, 1, 0))
    if mask is None:
        return F.pad(q, (0, 0, 1, 0)), k, v, None
    return q, k, v, F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
