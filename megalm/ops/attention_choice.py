"""Which kernel computes attention on this machine: asked once for each case, tried before it is trusted, and told.

On a GPU a kernel is accepted when it gives what plain products give, and, where a run must be deterministic, when the same
inputs give the same bits in every repetition: kernels that are so in one version were not in another. What is not accepted makes
room for the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.config.root import ATTENTION_KERNELS
from megalm.ops.attention import (
    Case,
    Cudnn,
    Efficient,
    Flash,
    Flex,
    Inputs,
    InstalledFlash,
    Kernel,
    Mask,
    Scores,
    Torch,
)

_log = logging.getLogger(__name__)

KERNELS: list[Kernel] = [
    Cudnn(),
    InstalledFlash("FA4"),
    InstalledFlash("FA3"),
    Flash(),
    Flex(),
    Efficient(),
    Torch(),
    Scores(),
]
"""All that there are, the fastest on Hopper first: 470 to 575 TFLOP/s forward and backward with cuDNN and FlashAttention-3, 166
with FlashAttention-2's deterministic backward (flash-attention's pull request 1893, an H100, causal, 8k, heads of 128)."""

ORDER = {
    "fast": ("cudnn", "fa4", "fa3", "flash", "flex", "efficient", "scores"),
    "strict": ("flex", "fa4", "fa3", "flash", "efficient", "scores"),
}
"""What is tried on a GPU, by train.determinism. Strict leaves cuDNN out, whose backward adds in an order that changes."""


def register_attention_kernel(kernel: Kernel) -> None:
    """Let `ops.attention=NAME` mean this kernel; on a GPU it is tried against plain products before it is trusted.

    Errors: ValueError where the name is taken.
    """
    if kernel.name in ATTENTION_KERNELS:
        raise ValueError(f"a kernel of attention is called {kernel.name!r} already: name yours otherwise.")
    KERNELS.append(kernel)
    ATTENTION_KERNELS[kernel.name] = None


_REPEATS = 20
_LENGTH = 512
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest error of a kernel, of the largest value that plain products in fp32 give."""


class Served(Protocol):
    """What is chosen among: something that knows what it serves."""

    @property
    def name(self) -> str:
        """What it is called in ops.attention."""
        ...

    def why_not(self, case: Case) -> str | None:
        """Why it cannot serve the case here; None: it can."""
        ...


@dataclass(frozen=True)
class Choice:
    """The kernel of a case, and why those before it in the order do not serve."""

    case: Case
    kernel: Any
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        others = "".join(f"; not {name}: {why}" for name, why in self.passed_over)
        return f"attention ({self.case}) by {self.kernel.name}{others}"


class AttentionChoice:
    """Chooses a kernel for each case that comes, and keeps to it for the life of the process.

    asked: a kernel's name, which then serves every case or is refused; auto: the order of `determinism` (strict, fast).
    kernels: those that there are, with a `why_not(case)`; trial: tries one on a case as `try_kernel` does.
    """

    def __init__(
        self,
        asked: str = "auto",
        determinism: str = "fast",
        *,
        kernels: Iterable[Served] = KERNELS,
        trial: Callable[[Any, Case, int], str | None] | None = None,
    ) -> None:
        self.asked, self.determinism = asked, determinism
        self.kernels = {kernel.name: kernel for kernel in kernels}
        self.trial: Callable[[Any, Case, int], str | None] = trial or try_kernel
        self._chosen: dict[Case, Choice] = {}

    def __call__(self, call: Inputs) -> Tensor:
        """Compute attention by the kernel of its case. Shapes: -> [B, A, S, e]"""
        result: Tensor = self.choose(call.case).kernel(call)
        return result

    def change(self, asked: str, determinism: str) -> None:
        """Serve by other wishes from now on: what was chosen is forgotten."""
        self.asked, self.determinism = asked, determinism
        self._chosen.clear()

    def list_choices(self) -> list[Choice]:
        """List what was chosen so far, in the order in which it was asked for."""
        return list(self._chosen.values())

    def among(self, kernels: Iterable[Served], trial: Callable[[Any, Case, int], str | None]) -> AttentionChoice:
        """The same wishes for other kernels: those of context parallelism."""
        return AttentionChoice(self.asked, self.determinism, kernels=kernels, trial=trial)

    def choose(self, case: Case) -> Choice:
        """Choose the kernel that serves a case. ConfigError where one was asked for that does not."""
        choice = self._chosen.get(case)
        if choice is None:
            choice = self._chosen[case] = self._find(case)
            if case.device == "cuda":
                _log.info("%s", choice)
        return choice

    def _find(self, case: Case) -> Choice:
        passed_over: list[tuple[str, str]] = []
        for name in self._candidates(case):
            kernel = self.kernels.get(name)
            why = (
                kernel.why_not(case)
                if kernel is not None
                else "it gives no log-sum-exp, which parallel.context asks for"
            )
            if why is None and case.device == "cuda" and name != "scores":
                why = self.trial(kernel, case, _REPEATS if self.determinism == "strict" else 1)
            if why is None:
                return Choice(case, kernel, tuple(passed_over))
            passed_over.append((name, why))
        free = AttentionChoice("auto", self.determinism, kernels=self.kernels.values(), trial=self.trial)
        serving = free.choose(case).kernel.name
        raise ConfigError(
            f"ops.attention={self.asked} does not serve attention here ({case}): {passed_over[-1][1]}. {serving} does: "
            f"ops.attention={serving}, or auto."
        )

    def _candidates(self, case: Case) -> tuple[str, ...]:
        if self.asked != "auto":
            return (self.asked,)
        if case.device == "cuda":
            # Where a GPU build of torch has other kernels (ROCm), it chooses among them itself.
            order = ("torch", "scores") if torch.version.hip else ORDER[self.determinism]
            return tuple(name for name in order if name in self.kernels)
        return ("torch", "scores")


def try_kernel(kernel: Kernel, case: Case, repeats: int, device: str | None = None) -> str | None:
    """Let a kernel compute a case on random numbers, forward and backward, so often; returns why it cannot be trusted, or None.

    Random numbers come from a generator of its own: those of the run go on as if nothing had been tried.
    """
    call, grad = _make_inputs(case, device or case.device)
    wide = replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float())
    return compare_repeatedly(
        lambda: _differentiate(kernel, call, grad),
        lambda: _differentiate(Scores(), wide, grad.float()),
        ("output", "dq", "dk", "dv"),
        _TOLERANCE[case.dtype],
        repeats,
    )


def compare_repeatedly(
    compute: Callable[[], Sequence[Tensor]],
    expect: Callable[[], Sequence[Tensor]],
    names: Sequence[str],
    tolerance: float,
    repeats: int,
) -> str | None:
    """Why what is computed is not what is expected, of its largest value, or not the same bits each time; None: it is."""
    try:
        first = compute()
        for name, got, right in zip(names, first, expect(), strict=True):
            apart = float((got.float() - right).abs().max() / right.abs().max())
            if not apart <= tolerance:
                return f"its {name} is {apart:.1e} of the largest value off plain products"
        for _ in range(repeats - 1):
            for name, got, right in zip(names, compute(), first, strict=True):
                if not torch.equal(got, right):
                    return f"its {name} is not the same bits each time"
    except Exception as error:  # a compiler's, a driver's, an optional package's: whatever it is, another kernel serves
        lines = str(error).strip().splitlines()
        return f"it fails: {lines[0][:200] if lines else type(error).__name__}"
    return None


def _make_inputs(case: Case, device: str) -> tuple[Inputs, Tensor]:
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    seen = _LENGTH // 4 if case.mask == "cached" else 0
    mask = Mask(
        _LENGTH - seen,
        device,
        seen=seen,
        window=_LENGTH // 3 if case.mask == "window" else None,
        documents=_draw_documents(device) if case.mask == "documents" else None,
        slopes=torch.linspace(0.02, 0.5, case.heads, device=device) if case.mask == "alibi" else None,
    )
    q = draw(1, case.heads, _LENGTH - seen, case.head_dim)
    k, v = draw(1, case.groups, _LENGTH, case.head_dim), draw(1, case.groups, _LENGTH, case.value_dim)
    sinks = torch.linspace(-1.0, 1.0, case.heads, device=device) if case.sinks else None
    call = Inputs(q, k, v, mask, case.head_dim**-0.5, 30.0 if case.capped else None, sinks)
    return call, draw(1, case.heads, _LENGTH - seen, case.value_dim)


def _draw_documents(device: str) -> Tensor:
    """Draw documents of several lengths."""
    return (torch.arange(_LENGTH, device=device) * 5 // _LENGTH)[None].int()


def _differentiate(kernel: Kernel, call: Inputs, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]
        out = kernel(replace(call, q=leaves[0], k=leaves[1], v=leaves[2]))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]
