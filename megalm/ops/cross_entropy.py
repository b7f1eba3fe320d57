"""Cross-entropy over logits that may be one shard of the vocabulary. Contract: csrc/cross_entropy/op.h.

The pieces: `cross_entropy_statistics` reads the logits once; the caller joins shards with `join_statistics`;
`cross_entropy_gradient` reads and writes them once more, in place if asked. `cross_entropy` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.ops.backend import DTYPE_CODES, find_address, get_library, place, require, use_native

# Elements that the reference handles at a time in fp32.
_BLOCK = 1 << 20


class Statistics(NamedTuple):
    """What the logits' columns on this rank say, each fp32 [rows].

    peak: largest logit (-inf without columns). total: sum of exp(logit - peak). target: the label's logit, 0 where the
    label is elsewhere. sum: sum of the logits, where asked for (label smoothing needs it).
    """

    peak: Tensor
    total: Tensor
    target: Tensor
    sum: Tensor | None


def _check(logits: Tensor, labels: Tensor, columns: int) -> None:
    require(logits.dim() == 2, f"cross_entropy: logits has shape {tuple(logits.shape)}; it must be [rows, columns].")
    require(
        labels.shape == logits.shape[:1] and labels.dtype == torch.int64 and labels.device == logits.device,
        f"cross_entropy: labels is {labels.dtype} {tuple(labels.shape)} on {labels.device}; it must be torch.int64 "
        f"({logits.shape[0]},) on {logits.device}, as logits is.",
    )
    require(
        0 <= columns <= logits.shape[1],
        f"cross_entropy: {columns} columns count, but logits has {logits.shape[1]}.",
    )


def cross_entropy_statistics(
    logits: Tensor, labels: Tensor, *, first: int = 0, columns: int | None = None, with_sum: bool = True
) -> Statistics:
    """The statistics of this rank's columns, whose global indices begin at `first`; columns past `columns` are padding.

    Shapes: logits [N, V/t], labels int64 [N] -> fp32 [N] each. No gradient.
    """
    columns = logits.shape[-1] if columns is None else columns
    _check(logits, labels, columns)
    if use_native("cross_entropy", logits=logits) and logits.stride(1) == 1:
        run = _STATISTICS if torch.compiler.is_compiling() else _statistics
        parts = run(logits, labels, first, columns, with_sum).unbind()
        return Statistics(parts[0], parts[1], parts[2], parts[3] if with_sum else None)
    return _statistics_reference(logits, labels, first, columns)


def _statistics(logits: Tensor, labels: Tensor, first: int, columns: int, with_sum: bool) -> Tensor:
    """The rows of `Statistics`, [3 or 4, N]."""
    parts = _statistics_fake(logits, labels, first, columns, with_sum)
    labels = labels.contiguous()
    rows, stride = logits.shape[0], logits.stride(0)
    peak, total, target = map(find_address, parts[:3].unbind())
    sum_ = find_address(parts[3]) if with_sum else 0
    get_library().cross_entropy_forward(
        *place(logits),
        DTYPE_CODES[logits.dtype],
        rows,
        columns,
        stride,
        first,
        find_address(logits),
        find_address(labels),
        peak,
        total,
        target,
        sum_,
    )
    return parts


def _statistics_fake(logits: Tensor, labels: Tensor, first: int, columns: int, with_sum: bool) -> Tensor:
    return logits.new_empty((4 if with_sum else 3, logits.shape[0]), dtype=torch.float32)


_STATISTICS = torch.library.custom_op("megalm::cross_entropy_statistics", _statistics, mutates_args=())
_STATISTICS.register_fake(_statistics_fake)


def _statistics_reference(logits: Tensor, labels: Tensor, first: int, columns: int) -> Statistics:
    rows = logits.shape[0]
    peak, total, target, plain = logits.new_zeros((4, rows), dtype=torch.float32).unbind()
    if not columns:
        return Statistics(peak.fill_(-torch.inf), total, target, plain)
    step = max(1, _BLOCK // columns)
    for begin in range(0, rows, step):
        block = slice(begin, begin + step)
        values = logits[block, :columns].float()
        top = values.amax(1)
        peak[block], plain[block] = top, values.sum(1)
        total[block] = (values - torch.where(top == -torch.inf, 0.0, top)[:, None]).exp().sum(1)
        local = labels[block] - first
        here = (local >= 0) & (local < columns)
        picked = values.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0]
        target[block] = torch.where(here, picked, 0.0)
    return Statistics(peak, total, target, plain)


def cross_entropy_gradient(
    logits: Tensor,
    labels: Tensor,
    log_z: Tensor,
    scale: Tensor,
    weight: Tensor,
    *,
    first: int = 0,
    columns: int | None = None,
    smoothing: float = 0.0,
    uniform: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """scale * softmax - weight * (1 - smoothing) at the label - weight * uniform; padding columns get 0.

    Shapes: logits [N, V/t], labels int64 [N], log_z, scale, weight fp32 [N] -> [N, V/t]; inplace: logits itself
    """
    columns = logits.shape[-1] if columns is None else columns
    _check(logits, labels, columns)
    if use_native("cross_entropy", logits=logits):
        source = logits if inplace else logits.contiguous()
        require(source.is_contiguous(), "cross_entropy: inplace needs contiguous logits.")
        options = (first, columns, smoothing, uniform)
        if torch.compiler.is_compiling():
            result = _GRADIENT(source, labels, log_z, scale, weight, *options)
            return source.copy_(result) if inplace else result
        result = source if inplace else torch.empty_like(source)
        _gradient_into(result, source, labels, log_z, scale, weight, *options)
        return result
    result = logits if inplace else torch.empty_like(logits)
    step = max(1, _BLOCK // max(1, columns))
    for begin in range(0, logits.shape[0], step):
        block = slice(begin, begin + step)
        values = logits[block, :columns].float()
        values = (values - log_z[block, None]).exp_().mul_(scale[block, None])
        values -= (weight[block] * uniform)[:, None]
        if columns:
            local = labels[block] - first
            hit = torch.where((local >= 0) & (local < columns), -weight[block] * (1.0 - smoothing), 0.0)
            values.scatter_add_(1, local.clamp(0, columns - 1)[:, None], hit[:, None])
        result[block, :columns] = values
    result[:, columns:] = 0.0
    return result


def _gradient_into(
    result: Tensor,
    logits: Tensor,
    labels: Tensor,
    log_z: Tensor,
    scale: Tensor,
    weight: Tensor,
    first: int,
    columns: int,
    smoothing: float,
    uniform: float,
) -> None:
    # Held by name: a copy that nobody holds is gone, or another's, before the kernel reads it.
    labels, log_z, scale, weight = (t.contiguous() for t in (labels, log_z, scale, weight))
    (rows, stride), gradient = logits.shape, find_address(result)
    get_library().cross_entropy_backward(
        *place(logits),
        DTYPE_CODES[logits.dtype],
        rows,
        columns,
        stride,
        first,
        smoothing,
        uniform,
        find_address(logits),
        find_address(labels),
        find_address(log_z),
        find_address(scale),
        find_address(weight),
        gradient,
    )


def _gradient(
    logits: Tensor,
    labels: Tensor,
    log_z: Tensor,
    scale: Tensor,
    weight: Tensor,
    first: int,
    columns: int,
    smoothing: float,
    uniform: float,
) -> Tensor:
    result = torch.empty_like(logits)
    _gradient_into(result, logits, labels, log_z, scale, weight, first, columns, smoothing, uniform)
    return result


def _gradient_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


_GRADIENT = torch.library.custom_op("megalm::cross_entropy_gradient", _gradient, mutates_args=())
_GRADIENT.register_fake(_gradient_fake)


class Joined(NamedTuple):
    """Statistics over the whole vocabulary, each fp32 [rows]; log_total is relative to peak."""

    peak: Tensor
    log_total: Tensor
    target: Tensor
    sum: Tensor | None

    @property
    def log_z(self) -> Tensor:
        return self.log_total + self.peak


def join_statistics(own: Statistics, reduce: Callable[[Tensor, str], Tensor] | None = None) -> Joined:
    """The statistics of all columns.

    reduce(tensor, "max" | "sum"): all-reduce over the ranks that hold the other columns; None: there are none.

    Comm: one all-reduce of [N] (max) and one of [2, N], with the logits' sums [3, N] (sum)
    """
    if reduce is None:
        return Joined(own.peak, own.total.log(), own.target, own.sum)
    top = reduce(own.peak.clone(), "max")
    shifted = torch.where(own.peak == -torch.inf, 0.0, own.total * (own.peak - top).exp())
    parts = (shifted, own.target) if own.sum is None else (shifted, own.target, own.sum)
    total, target, *plain = reduce(torch.stack(parts), "sum").unbind()
    return Joined(top, total.log(), target, plain[0] if plain else None)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:  # type: ignore[override]
        joined = options.join(logits, labels)
        loss, counted = options.loss(joined, labels)
        ctx.save_for_backward(logits, labels, joined.log_z, counted)
        ctx.options, ctx.spent = options, False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        logits, labels, log_z, counted = ctx.saved_tensors
        options: LossOptions = ctx.options
        inplace = options.inplace_backward and not torch.compiler.is_compiling()
        if inplace:
            require(
                not ctx.spent, "cross_entropy with inplace_backward=True has one backward pass: its logits are gone."
            )
            ctx.spent = True
        gradient = options.gradient(logits.detach(), labels, log_z, counted, grad.float(), inplace=inplace)
        return gradient, None, None


class LossOptions(NamedTuple):
    """What the loss of a row is, and which columns of the vocabulary this rank holds."""

    first: int
    columns: int
    vocab_size: int
    z_loss: float
    smoothing: float
    reduce: Callable[[Tensor, str], Tensor] | None
    inplace_backward: bool

    def join(self, logits: Tensor, labels: Tensor) -> Joined:
        """The logits' statistics over all ranks."""
        own = cross_entropy_statistics(
            logits, labels, first=self.first, columns=self.columns, with_sum=self.smoothing != 0.0
        )
        return join_statistics(own, self.reduce)

    def loss(self, joined: Joined, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each row, and which rows count. The peak goes first: large logits do not cancel."""
        loss = joined.log_total + (1.0 - self.smoothing) * (joined.peak - joined.target)
        if self.smoothing:
            assert joined.sum is not None
            loss += self.smoothing * (joined.peak - joined.sum / self.vocab_size)
        if self.z_loss:
            loss += self.z_loss * joined.log_z.square()
        counted = (labels >= 0) & (labels < self.vocab_size)
        return torch.where(counted, loss, 0.0), counted

    def gradient(
        self, logits: Tensor, labels: Tensor, log_z: Tensor, counted: Tensor, grad: Tensor, *, inplace: bool
    ) -> Tensor:
        weight = torch.where(counted, grad, 0.0)
        scale = weight * (1.0 + 2.0 * self.z_loss * log_z) if self.z_loss else weight
        return cross_entropy_gradient(
            logits,
            labels,
            log_z,
            scale,
            weight,
            first=self.first,
            columns=self.columns,
            smoothing=self.smoothing,
            uniform=self.smoothing / self.vocab_size,
            inplace=inplace,
        )


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    first: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduce: Callable[[Tensor, str], Tensor] | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Loss of each position, fp32: log Z - logit of the label (smoothed) + z_loss * log^2 Z.

    A label outside [0, vocab_size) gives loss 0 and no gradient. Vocabulary split over ranks: `first` is the global
    index of this rank's first column and `reduce(tensor, "max" | "sum")` all-reduces over them; columns past
    vocab_size are padding.
    inplace_backward: the gradient is written over the logits, which nothing else may read afterwards.

    Shapes: logits [.., V/t], labels int64 [..] -> [..]
    Comm:   forward: with reduce, all-reduce of [N] (max) and [2, N] (sum; [3, N] with smoothing); backward none
    Source: Shoeybi et al. 2019 (arXiv:1909.08053), sec. 3; Chowdhery et al. 2022 (arXiv:2204.02311), sec. 5
    """
    width = logits.shape[-1]
    vocab_size = first + width if vocab_size is None else vocab_size
    columns = max(0, min(width, vocab_size - first))
    require(
        labels.shape == logits.shape[:-1],
        f"cross_entropy: labels has shape {tuple(labels.shape)}; for logits {tuple(logits.shape)} it must be "
        f"{tuple(logits.shape[:-1])}.",
    )
    options = LossOptions(first, columns, vocab_size, z_loss, label_smoothing, reduce, inplace_backward)
    flat = logits.reshape(-1, width).contiguous()
    return _CrossEntropy.apply(flat, labels.reshape(-1), options).view(labels.shape)
