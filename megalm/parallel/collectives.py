"""Communication over one axis of the mesh: the one place that calls torch.distributed's collectives.

Plain functions (`all_reduce`, `all_gather`, `reduce_scatter`, ...) work on tensors; the autograd functions come in
conjugate pairs, each of which is the other's backward:

    copy   identity      <-> all-reduce       reduce
    gather all-gather    <-> reduce-scatter   scatter
    split  own part      <-> all-gather       join
    deal   all-to-all    <-> all-to-all       deal

Every one takes its axis as an argument and does nothing at all on an axis of size 1.
16-bit floats are summed in fp32, in rank order, and rounded once: each rank gets its part from all others
(all-to-all), adds, and for an all-reduce the rounded sums are gathered. That moves the same bytes as a ring and is
exact, where a 16-bit ring rounds at every hop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.ops.sequence import sum_parts
from megalm.parallel.mesh import Axis

# Newer torch renamed two collectives; the old names warn.
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_NARROW = (torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------------------------- count
class ByteCounter:
    """Bytes that this rank sent, by (operation, axis name), while the counter was active.

    An operation over n ranks is charged what a bandwidth-optimal algorithm sends from each rank: all-reduce of b
    bytes 2 b (n-1)/n; all-gather to, reduce-scatter from and all-to-all of b bytes b (n-1)/n; a point-to-point
    message b.
    """

    def __init__(self) -> None:
        self.bytes: dict[tuple[str, str], float] = {}
        self.calls: dict[tuple[str, str], int] = {}

    def add(self, operation: str, axis: str, sent: float) -> None:
        key = (operation, axis)
        self.bytes[key] = self.bytes.get(key, 0.0) + sent
        self.calls[key] = self.calls.get(key, 0) + 1

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


_COUNTERS: list[ByteCounter] = []


@contextmanager
def count_bytes() -> Iterator[ByteCounter]:
    """Counts everything this process sends through megalm's collectives inside the block."""
    counter = ByteCounter()
    _COUNTERS.append(counter)
    try:
        yield counter
    finally:
        _COUNTERS.remove(counter)


def record(operation: str, axis: Axis, sent: float) -> None:
    """Charge `sent` bytes to the active counters (for code that must call torch.distributed itself)."""
    for counter in _COUNTERS:
        counter.add(operation, axis.name, sent)


# ---------------------------------------------------------------------------------------------------------------- handl
class Pending:
    """A collective under way. `wait()` returns its result; waiting twice is free."""

    def __init__(self, work: Any, finish: Callable[[], Tensor], keep: Any = None) -> None:
        self._work, self._finish, self._keep = work, finish, keep
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        if self._result is None:
            if self._work is not None:
                self._work.wait()
            self._result = self._finish()
            self._work = self._keep = None
        return self._result


def _done(tensor: Tensor) -> Pending:
    return Pending(None, lambda: tensor)


# ---------------------------------------------------------------------------------------------------------------- plain
def all_reduce(tensor: Tensor, axis: Axis, operation: str = "sum") -> Tensor:
    """Reduce `tensor` in place over the axis ("sum", "max" or "min"); returns it."""
    return all_reduce_async(tensor, axis, operation).wait()


def all_reduce_async(tensor: Tensor, axis: Axis, operation: str = "sum") -> Pending:
    """Start an in-place all-reduce of a contiguous tensor."""
    if axis.size == 1:
        return _done(tensor)
    if operation == "sum" and tensor.dtype in _NARROW:
        return _narrow_all_reduce(tensor, axis)
    record("all_reduce", axis, 2 * tensor.numel() * tensor.element_size() * (axis.size - 1) / axis.size)
    op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[operation]
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    work = dist.all_reduce(flat, op, group=axis.group, async_op=True)

    def finish() -> Tensor:
        if flat is not tensor:
            tensor.copy_(flat)
        return tensor

    return Pending(work, finish, keep=flat)


def _narrow_all_reduce(tensor: Tensor, axis: Axis) -> Pending:
    """16-bit sum with fp32 accumulation: all-to-all of parts, local sums, all-gather of the rounded sums."""
    size = axis.size
    part = -(-tensor.numel() // size)
    record("all_reduce", axis, 2 * tensor.numel() * tensor.element_size() * (size - 1) / size)
    flat = tensor.reshape(-1)
    if part * size != flat.numel():
        flat = torch.nn.functional.pad(flat, (0, part * size - flat.numel()))
    received = torch.empty_like(flat)
    work = dist.all_to_all_single(received, flat.contiguous(), group=axis.group, async_op=True)

    def finish() -> Tensor:
        own = sum_parts(received.view(size, part))
        whole = torch.empty(size * part, dtype=tensor.dtype, device=tensor.device)
        _all_gather_single(whole, own, group=axis.group)
        return tensor.copy_(whole[: tensor.numel()].view(tensor.shape))

    return Pending(work, finish, keep=(flat, received))


def all_gather(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate every rank's tensor along `dim`, in rank order. Shapes: [.., n, ..] -> [.., n * axis.size, ..]"""
    return all_gather_async(tensor, axis, dim).wait()


def all_gather_async(tensor: Tensor, axis: Axis, dim: int = 0) -> Pending:
    """Start an all-gather."""
    if axis.size == 1:
        return _done(tensor)
    record("all_gather", axis, tensor.numel() * tensor.element_size() * (axis.size - 1))
    tensor = tensor.contiguous()
    whole = tensor.new_empty((axis.size * tensor.shape[0], *tensor.shape[1:]) if tensor.dim() else (axis.size,))
    work = _all_gather_single(whole, tensor, group=axis.group, async_op=True)

    def finish() -> Tensor:
        return whole if dim == 0 else torch.cat(whole.chunk(axis.size), dim)

    return Pending(work, finish, keep=tensor)


def all_gather_into(whole: Tensor, part: Tensor, axis: Axis) -> Pending:
    """Start an all-gather of flat parts into a flat buffer that exists; `part` may be its own place inside `whole`."""
    if axis.size == 1:
        if part.data_ptr() != whole.data_ptr():
            whole.copy_(part)
        return _done(whole)
    record("all_gather", axis, part.numel() * part.element_size() * (axis.size - 1))
    work = _all_gather_single(whole, part, group=axis.group, async_op=True)
    return Pending(work, lambda: whole, keep=part)


def reduce_scatter(tensor: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Sum every rank's tensor and keep this rank's part of `dim`. Shapes: [.., n * axis.size, ..] -> [.., n, ..]"""
    return reduce_scatter_async(tensor, axis, dim).wait()


def reduce_scatter_async(tensor: Tensor, axis: Axis, dim: int = 0) -> Pending:
    """Start a reduce-scatter (sum). ValueError if the axis does not divide the dimension."""
    size = axis.size
    if size == 1:
        return _done(tensor)
    if tensor.shape[dim] % size:
        raise ValueError(f"dim {dim} of shape {tuple(tensor.shape)} cannot be scattered over {size} {axis.name} ranks")
    record("reduce_scatter", axis, tensor.numel() * tensor.element_size() * (size - 1) / size)
    if dim:
        tensor = torch.cat(tensor.chunk(size, dim))
    tensor = tensor.contiguous()
    shape = (tensor.shape[0] // size, *tensor.shape[1:])
    if tensor.dtype in _NARROW:
        received = torch.empty_like(tensor)
        work = dist.all_to_all_single(received, tensor, group=axis.group, async_op=True)
        return Pending(work, lambda: sum_parts(received.view(size, *shape)), keep=tensor)
    part = tensor.new_empty(shape)
    work = _reduce_scatter_single(part, tensor, group=axis.group, async_op=True)
    return Pending(work, lambda: part, keep=tensor)


def all_to_all(tensor: Tensor, axis: Axis, send: list[int] | None = None, receive: list[int] | None = None) -> Tensor:
    """Exchange parts of dim 0: rank i's part j becomes rank j's part i. `send`, `receive`: sizes of uneven parts."""
    if axis.size == 1:
        return tensor
    tensor = tensor.contiguous()
    row = tensor[:1].numel() * tensor.element_size()
    kept = tensor.shape[0] // axis.size if send is None else send[axis.rank]
    record("all_to_all", axis, (tensor.shape[0] - kept) * row)
    rows = tensor.shape[0] if receive is None else sum(receive)
    received = tensor.new_empty((rows, *tensor.shape[1:]))
    dist.all_to_all_single(received, tensor, receive, send, group=axis.group)
    return received


def broadcast(tensor: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Overwrite `tensor` with that of the axis' rank `source`; returns it."""
    if axis.size > 1:
        record("broadcast", axis, tensor.numel() * tensor.element_size() if axis.rank == source else 0)
        dist.broadcast(tensor, src=axis.ranks[source], group=axis.group)
    return tensor


def hand_over(tensor: Tensor, axis: Axis, source: int, to: int) -> Tensor:
    """On axis rank `to` overwrite `tensor` with that of axis rank `source`; on both, returns it. Other ranks do not call."""
    if source != to and axis.rank == source:
        record("send", axis, tensor.numel() * tensor.element_size())
        dist.send(tensor.contiguous(), axis.ranks[to], group=axis.group)
    elif source != to and axis.rank == to:
        dist.recv(tensor, axis.ranks[source], group=axis.group)
    return tensor


def exchange(tensors: list[Tensor], axis: Axis, to: int, source: int) -> list[Tensor]:
    """Send tensors to axis rank `to` while receiving tensors of the same shapes from axis rank `source`."""
    return exchange_async(tensors, axis, to, source)()


def exchange_async(tensors: list[Tensor], axis: Axis, to: int, source: int) -> Callable[[], list[Tensor]]:
    """Start an exchange; calling the result waits and returns the received tensors."""
    if axis.size == 1:
        return lambda: tensors
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    record("send", axis, sum(tensor.numel() * tensor.element_size() for tensor in sent))
    operations = [dist.P2POp(dist.isend, tensor, axis.ranks[to], group=axis.group) for tensor in sent]
    operations += [dist.P2POp(dist.irecv, tensor, axis.ranks[source], group=axis.group) for tensor in received]
    works = dist.batch_isend_irecv(operations) if not sent[0].is_meta else []  # without data, nothing to wait for

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()
        return received

    return wait


# ---------------------------------------------------------------------------------------------------------------- autog
_Collective = Callable[[Tensor, Axis, int], Tensor]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Along(torch.autograd.Function):
    """A collective along one dimension, and in backward another: its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, there: _Collective, back: _Collective) -> Tensor:
        ctx.axis, ctx.dim, ctx.back = axis, dim, back
        return there(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.back(grad, ctx.axis, ctx.dim), None, None, None, None


def _own_part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    if x.shape[dim] % axis.size:
        raise ValueError(f"dim {dim} of shape {tuple(x.shape)} cannot be split over {axis.size} {axis.name} ranks")
    part = x.shape[dim] // axis.size
    return x.narrow(dim, axis.rank * part, part).contiguous()


def copy(x: Tensor, axis: Axis) -> Tensor:
    """Enter a region where each rank computes with its own weights. Comm: backward all-reduce."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Leave such a region: sum the ranks' partial results. Comm: forward all-reduce."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Enter a region from sharded activations. Shapes: [S/n, ..] -> [S, ..]. Comm: all-gather; backward
    reduce-scatter."""
    return x if axis.size == 1 else _Along.apply(x, axis, dim, all_gather, reduce_scatter)


def scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Leave it to sharded activations: sum, keep own part. Shapes: [S, ..] -> [S/n, ..]. Comm: reduce-scatter;
    backward all-gather."""
    return x if axis.size == 1 else _Along.apply(x, axis, dim, reduce_scatter, all_gather)


def split(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Own part of a tensor that all ranks hold alike. Shapes: [S, ..] -> [S/n, ..]. Comm: backward all-gather."""
    return x if axis.size == 1 else _Along.apply(x, axis, dim, _own_part, all_gather)


def join(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Whole tensor whose use is the same on all ranks. Shapes: [S/n, ..] -> [S, ..]. Comm: forward all-gather."""
    return x if axis.size == 1 else _Along.apply(x, axis, dim, all_gather, _own_part)


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return all_to_all(x, axis, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_to_all(grad, ctx.axis, ctx.receive, ctx.send), None, None, None


def deal(x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
    """Give `send[j]` rows to rank j, and get `receive[j]` from it, in rank order. Shapes: [sum send, ..] -> [sum receive, ..].
    Comm: all-to-all forward and backward."""
    return x if axis.size == 1 else _Deal.apply(x, axis, send, receive)
