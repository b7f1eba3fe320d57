"""AdamW over one flat buffer, in one pass. Contract: csrc/adamw/op.h."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, find_address, find_vendor, get_library, place, require, use_native


class Segments(NamedTuple):
    """Where the tensors of a flat buffer end, int64 [T], rising, the last the buffer's size; the rates, fp32 [T], by
    which lr is multiplied in each. Both on the buffer's device."""

    ends: Tensor
    rates: Tensor

    def of_elements(self, size: int) -> Tensor:
        """The rate of each element, [size]."""
        lengths = torch.diff(self.ends, prepend=self.ends.new_zeros(1))
        return self.rates.repeat_interleave(lengths, output_size=size)


@torch.no_grad()
def adamw_reference_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    skip: Tensor | None = None,
    out: Tensor | None = None,
    segments: Segments | None = None,
) -> None:
    def keep(old: Tensor, new: Tensor) -> None:
        old.copy_(new if skip is None else torch.where(skip != 0, old, new.to(old.dtype)))

    g = grad * grad_scale
    first = exp_avg * beta1 + (1.0 - beta1) * g
    second = exp_avg_sq * beta2 + (1.0 - beta2) * g * g
    denominator = (second / (1.0 - beta2**step)).sqrt_().add_(eps)
    rate: float | Tensor = lr
    if segments is not None:
        rate = lr * segments.of_elements(master.numel()).to(master.dtype).view(master.shape)
    updated = master * (1.0 - rate * weight_decay) - rate / (1.0 - beta1**step) * first / denominator
    for old, new in ((exp_avg, first), (exp_avg_sq, second), (master, updated)):
        keep(old, new)
    if out is not None:
        keep(out, updated)


@torch.no_grad()
def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    skip: Tensor | None = None,
    out: Tensor | None = None,
    segments: Segments | None = None,
) -> None:
    """One update in place; grad is only read.

    g = grad * grad_scale;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay) - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

    step counts from 1. grad_scale: a number, or a one-element tensor, which is read on its device.
    skip: a one-element tensor; nothing is written where it is not 0. out: where the rounded weights go as well.
    segments: where lr is multiplied by a rate of each tensor's own (update clipping: `update_clipping_rates`).

    Shapes: master, grad, exp_avg, exp_avg_sq fp32 [N]; out [N] fp32, bf16 or fp16
    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101)
    """
    require(step >= 1, f"adamw_: step={step}; it counts from 1.")
    if segments is not None:
        _check_segments("adamw_", master, segments.ends)
        require(
            segments.rates.shape == segments.ends.shape and segments.rates.dtype == torch.float32,
            f"adamw_: segments.rates is {segments.rates.dtype} {tuple(segments.rates.shape)}; it must be torch.float32 "
            f"{tuple(segments.ends.shape)}, one for each end.",
        )
    state = {"master": master, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in (*state.items(), ("out", out)):
        require(
            tensor is None or tensor.shape == master.shape,
            f"adamw_: {name} has another shape than master, {tuple(master.shape)}.",
        )
    options = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "step": step,
        "grad_scale": grad_scale,
        "out": out,
    }
    other = find_vendor("adamw_", master)
    if other is not None and skip is None and segments is None:
        other(*state.values(), **options)
        return
    tensors = [*state.values(), *([] if out is None else [out])]
    fits = all(t.is_contiguous() for t in tensors) and master.dtype == torch.float32
    if out is not None:
        fits = fits and use_native("adamw_", out=out) and out.device == master.device
    if not use_native("adamw_", **state) or not fits:
        adamw_reference_(*state.values(), **options, skip=skip, segments=segments)  # type: ignore[arg-type]
        return
    factor, scale = _scale(grad_scale, master.device)
    if skip is not None:
        skip = skip.to(device=master.device, dtype=torch.float32)
    ends, rates = (None, None) if segments is None else segments
    run = _UPDATE if torch.compiler.is_compiling() else _update
    numbers = (lr, beta1, beta2, eps, weight_decay, 1.0 - beta1**step, 1.0 - beta2**step, factor)
    run(master, grad, exp_avg, exp_avg_sq, out, scale, skip, ends, rates, *numbers)


def _update(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    out: Tensor | None,
    grad_scale_pointer: Tensor | None,
    skip: Tensor | None,
    ends: Tensor | None,
    rates: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    correction1: float,
    correction2: float,
    grad_scale: float,
) -> None:
    size = master.numel()
    out_dtype = 0 if out is None else DTYPE_CODES[out.dtype]
    segments, segment_ends, segment_rates = 0 if ends is None else ends.numel(), find_address(ends), find_address(rates)
    get_library().adamw(
        *place(master),
        size,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        correction1,
        correction2,
        grad_scale,
        find_address(grad_scale_pointer),
        find_address(skip),
        find_address(master),
        find_address(grad),
        find_address(exp_avg),
        find_address(exp_avg_sq),
        out_dtype,
        find_address(out),
        segments,
        segment_ends,
        segment_rates,
    )


_UPDATE = torch.library.custom_op("megalm::adamw_", _update, mutates_args=("master", "exp_avg", "exp_avg_sq", "out"))
_UPDATE.register_fake(lambda *arguments: None)


def _scale(grad_scale: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """The gradient's factor as a number, or as one number in the device's memory."""
    if isinstance(grad_scale, Tensor):
        return 1.0, grad_scale.to(device=device, dtype=torch.float32)
    return float(grad_scale), None


def _check_segments(op: str, buffer: Tensor, ends: Tensor) -> None:
    """The ends themselves are not read: on a GPU that would wait for it."""
    require(
        ends.dim() == 1 and ends.numel() > 0 and ends.dtype == torch.int64 and ends.is_contiguous(),
        f"{op}: segments.ends is {ends.dtype} {tuple(ends.shape)}; it must be contiguous torch.int64 [tensors].",
    )
    require(ends.device == buffer.device, f"{op}: segments.ends is on {ends.device}, the buffer on {buffer.device}.")


def update_squares_reference(
    grad: Tensor,
    exp_avg_sq: Tensor,
    lengths: list[int],
    beta2: float,
    eps: float,
    step: int,
    grad_scale: float | Tensor,
) -> Tensor:
    square = (grad * grad_scale).square()
    second = (exp_avg_sq * beta2 + (1.0 - beta2) * square) / (1.0 - beta2**step)
    ratios = square / second.clamp(min=eps**2)
    return torch.stack([part.sum(dtype=torch.float64) for part in ratios.split(lengths)])


@torch.no_grad()
def update_squares(
    grad: Tensor,
    exp_avg_sq: Tensor,
    lengths: list[int],
    *,
    beta2: float,
    eps: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    """The sum over each tensor of g^2 / max(v / (1 - beta2^step), eps^2), with v as this update will make it.

    Its mean over the whole tensor is the square of the update's size, were there no momentum: about 1, and much more
    when v lags behind gradients that grow. lengths: elements of each tensor, in the buffer's order; they add up to N.

    Shapes: grad, exp_avg_sq fp32 [N] -> fp64 [T]
    Source: Wortsman et al. 2023 (StableAdamW, arXiv:2304.13013), sec. 3
    """
    require(
        grad.dim() == 1 and sum(lengths) == grad.numel() and min(lengths, default=0) >= 0,
        f"update_squares: lengths add up to {sum(lengths)}, grad has shape {tuple(grad.shape)}.",
    )
    require(
        exp_avg_sq.shape == grad.shape,
        f"update_squares: exp_avg_sq has shape {tuple(exp_avg_sq.shape)}, grad {tuple(grad.shape)}.",
    )
    require(step >= 1, f"update_squares: step={step}; it counts from 1.")
    fits = grad.dtype == torch.float32 and grad.is_contiguous() and exp_avg_sq.is_contiguous() and bool(lengths)
    if not use_native("update_squares", grad=grad, exp_avg_sq=exp_avg_sq) or not fits:
        if not lengths:
            return grad.new_zeros(0, dtype=torch.float64)
        return update_squares_reference(grad, exp_avg_sq, lengths, beta2, eps, step, grad_scale)
    factor, scale = _scale(grad_scale, grad.device)
    run = _SQUARES if torch.compiler.is_compiling() else _squares
    return run(grad, exp_avg_sq, lengths, scale, beta2, eps, 1.0 - beta2**step, factor)


def _squares(
    grad: Tensor,
    exp_avg_sq: Tensor,
    lengths: list[int],
    grad_scale_pointer: Tensor | None,
    beta2: float,
    eps: float,
    correction2: float,
    grad_scale: float,
) -> Tensor:
    library = get_library()
    segments = len(lengths)
    segment_ends, block_starts, blocks = _bounds(tuple(lengths), library.ADAMW_BLOCK, grad.device)
    partial = grad.new_empty(blocks, dtype=torch.float64)
    result = grad.new_empty(segments, dtype=torch.float64)
    library.adamw_squares(
        *place(grad),
        segments,
        beta2,
        eps,
        correction2,
        grad_scale,
        find_address(grad_scale_pointer),
        find_address(grad),
        find_address(exp_avg_sq),
        find_address(segment_ends),
        find_address(block_starts),
        blocks,
        find_address(partial),
        find_address(result),
    )
    return result


@lru_cache(maxsize=1024)
def _bounds(lengths: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Where tensors end, and where their blocks begin, on the device; and how many blocks there are. Kept, since a run asks
    for the same ones in each step, and copying them to a GPU would wait for it."""
    size = torch.tensor(lengths)
    starts = torch.cat((size.new_zeros(1), ((size + block - 1) // block).cumsum(0)))
    return size.cumsum(0).to(device), starts.to(device), int(starts[-1])


_SQUARES = torch.library.custom_op("megalm::update_squares", _squares, mutates_args=())
_SQUARES.register_fake(lambda grad, *rest: grad.new_empty(len(rest[1]), dtype=torch.float64))


def update_clipping_rates(squares: Tensor, counts: Tensor) -> Tensor:
    """1 / max(1, root mean square) of each tensor: what its learning rate is multiplied by.

    squares: `update_squares`, added up over the ranks that hold parts of a tensor. counts: its elements in all.

    Shapes: squares, counts [T] -> fp32 [T]
    Source: Wortsman et al. 2023 (StableAdamW, arXiv:2304.13013), algorithm 2
    """
    return (squares / counts.clamp(min=1)).sqrt().clamp(min=1.0).reciprocal().float()
