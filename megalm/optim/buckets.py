"""Flat buffers: parameters grouped into buckets, each with its gradients, its fp32 masters and its optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from megalm.optim.groups import Group, Groups
from megalm.optim.stretches import Part, Stretch
from megalm.parallel import collectives
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.slices import Box, Piece, cut_range, slice_of

# Every parameter starts at a multiple of this many elements: 64 bytes of fp32, the widest vector load.
_ALIGN = 16


@dataclass(frozen=True)
class Entry:
    """A parameter and its place [start, stop) in the bucket."""

    parameter: nn.Parameter
    start: int
    stop: int

    def segments(self) -> Iterator[tuple[Piece, int, int]]:
        """Each piece with its place in the bucket; what lies between pieces is padding."""
        columns = self.parameter[:1].numel()
        for piece in slice_of(self.parameter).pieces:
            first = self.start + piece.row * columns
            yield piece, first, first + piece.shape[0] * columns


class Bucket:
    """Consecutive parameters of one kind whose gradients are reduced together.

    axis: ranks that hold the same parameters and whose gradients are summed. shards: over how many of them the
    optimizer's work is split (1, or axis.size with ZeRO); this rank's shard is [low, high).
    late: reduced only when all backward passes are done, because gradients must first be summed over other axes or
    copies. split: axes over whose ranks a rule for whole matrices finds their other parts.

    Buffers (flat):  weights [N] in the parameters' dtype, the parameters are views of it;  gradient [N] fp32;
                     master and each state of the rule [N / shards] fp32; masters of fp32 parameters are a view of weights
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        axis: Axis,
        *,
        shards: int,
        keep_gradient: bool,
        late: bool,
        group: Group,
        split: tuple[Axis, ...] = (),
    ) -> None:
        first = parameters[0]
        self.split = split
        self.axis, self.shards, self.late, self.keep_gradient = axis, shards, late, keep_gradient
        self.group = group
        self.entries, end = _place_whole(parameters, shards) if group.rule.whole_matrices else _place(parameters)
        grain = _ALIGN * axis.size
        self.length = -(-end // grain) * grain
        part = self.length // shards
        self.low, self.high = (axis.rank * part, (axis.rank + 1) * part) if shards > 1 else (0, self.length)

        self.weights = torch.zeros(self.length, dtype=first.dtype, device=first.device)
        for entry in self.entries:
            view = self.weights[entry.start : entry.stop].view(entry.parameter.shape)
            view.copy_(entry.parameter.detach())
            entry.parameter.data = view
        own = self.weights[self.low : self.high]
        self.has_master = first.dtype != torch.float32
        self.master = own.float() if self.has_master else own
        self.state = {name: torch.zeros_like(self.master) for name in group.rule.states}

        self.gradient: Tensor | None = None
        self.reduced: Tensor | None = None
        self.pending: list[collectives.Pending] = []
        self.gathering: collectives.Pending | None = None
        self.filled = [False] * len(self.entries)
        self.arrived = 0
        self.launched = False

    # ------------------------------------------------------------------------------------------------------- gradients
    def reset(self) -> None:
        """Forget the gradients of the last step."""
        self.filled = [False] * len(self.entries)
        self.arrived = 0
        self.launched = False
        self.reduced = None

    def gradient_view(self, index: int) -> Tensor:
        """The fp32 gradient buffer of a parameter, shaped like it."""
        if self.gradient is None:
            # Zeros, not empty: the gaps between parameters travel and are counted in norms.
            self.gradient = torch.zeros(self.length, dtype=torch.float32, device=self.weights.device)
        entry = self.entries[index]
        return self.gradient[entry.start : entry.stop].view(entry.parameter.shape)

    def fill_missing(self) -> None:
        """Zero the gradients that no backward pass has written."""
        for index, filled in enumerate(self.filled):
            if not filled:
                self.gradient_view(index).zero_()

    def launch(self) -> None:
        """Start summing the gradient buffer over the axis; each rank gets its shard of the sum."""
        self.fill_missing()
        assert self.gradient is not None
        self.launched = True
        if self.shards == 1:
            self.pending.append(collectives.all_reduce_async(self.gradient, self.axis))
        else:
            self.pending.append(collectives.reduce_scatter_async(self.gradient, self.axis))
            if not self.keep_gradient:
                self.gradient = None
                self.filled = [False] * len(self.entries)

    def collect(self, leave: int = 0) -> None:
        """Wait for reductions under way, all but the newest `leave`, and add them to this rank's shard of gradients."""
        while len(self.pending) > leave:
            part = self.pending.pop(0).wait()
            self.reduced = part if self.reduced is None else self.reduced.add_(part)

    def own_gradients(self) -> list[Tensor]:
        """The parts of the summed gradients that this rank alone contributes to the global norm.

        Elements that several ranks hold (replicated, tied) are contributed by their owner only; copies over the axis
        are dealt out.
        """
        assert self.reduced is not None
        part = self.length // self.axis.size
        low, high = self.axis.rank * part, (self.axis.rank + 1) * part
        base = self.low
        merged: list[list[int]] = []
        follows = False
        for entry in self.entries:
            for piece, start, stop in entry.segments():
                start, stop = max(start, low), min(stop, high)
                if not piece.owner or start >= stop:
                    follows = False
                elif follows and start - merged[-1][1] < _ALIGN:  # only an alignment gap between, and that is zero
                    merged[-1][1] = stop
                else:
                    merged.append([start, stop])
                    follows = True
        return [self.reduced[start - base : stop - base] for start, stop in merged]

    def part(self) -> Part:
        """This rank's shard, with the global tensors in it."""
        return Part(
            tuple(self._stretches()),
            self.master,
            self.state,
            self._shard_gradient,
            self.group,
            self.weights[self.low : self.high] if self.has_master else None,
            tuple(stretch.piece for stretch in self._stretches()),
            self.split,
        )

    def _shard_gradient(self) -> Tensor:
        assert self.reduced is not None
        return self.reduced

    def _stretches(self) -> Iterator[Stretch]:
        share = self.length // self.axis.size
        mine = self.axis.rank * share, (self.axis.rank + 1) * share
        for entry in self.entries:
            for piece, start, stop in entry.segments():
                low, high = max(start, self.low), min(stop, self.high)
                if low >= high:
                    continue
                first, last = max(low, mine[0]), min(high, mine[1])
                if not piece.owner or first >= last:
                    first = last = low
                base = self.low
                yield Stretch(piece, low - base, high - base, low - start, first - base, last - base)

    def partial_segments(self) -> Iterator[tuple[Axis, Tensor]]:
        """Gradient segments that must be summed over further axes, with the axis."""
        assert self.gradient is not None
        for entry in self.entries:
            for piece, start, stop in entry.segments():
                for axis in piece.sum_over:
                    yield axis, self.gradient[start:stop]

    # --------------------------------------------------------------------------------------------------------- weights
    def publish(self) -> None:
        """Start giving every rank of the axis the weights that belong to this rank's masters."""
        own = self.weights[self.low : self.high]
        if self.has_master:
            own.copy_(self.master)
        self.gather()

    def gather(self) -> None:
        """Start collecting the other ranks' shards of the weights."""
        if self.shards > 1:
            self.gathering = collectives.all_gather_into(self.weights, self.weights[self.low : self.high], self.axis)

    def wait_weights(self) -> None:
        """The weights are whole after this."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def boxes(self) -> Iterator[Box]:
        """This rank's masters and optimizer state as boxes of global tensors."""
        states = {f"optimizer.{name}.": flat for name, flat in self.state.items()}
        for prefix, flat in {"": self.master, **states}.items():
            for entry in self.entries:
                for piece, start, stop in entry.segments():
                    low, high = max(start, self.low), min(stop, self.high)
                    for offset, shape, element in cut_range(piece, low - start, high - start):
                        at = start + element - self.low
                        count = torch.Size(shape).numel()
                        yield Box(prefix + piece.name, piece.global_shape, offset, flat[at : at + count].view(shape))


def _room(parameter: nn.Parameter) -> int:
    """Elements that a parameter takes, with what aligns the next one."""
    return -(-parameter.numel() // _ALIGN) * _ALIGN


def _global_size(parameter: nn.Parameter) -> int:
    """Elements of the global tensors that a parameter holds parts of."""
    return sum(prod(piece.global_shape) for piece in slice_of(parameter).pieces)


def _place(parameters: Sequence[nn.Parameter]) -> tuple[list[Entry], int]:
    """One after the other. Returns the entries and where the last one's room ends."""
    entries: list[Entry] = []
    end = 0
    for parameter in parameters:
        entries.append(Entry(parameter, end, end + parameter.numel()))
        end += _room(parameter)
    return entries, end


def _place_whole(parameters: Sequence[nn.Parameter], shards: int) -> tuple[list[Entry], int]:
    """No parameter across the end of a shard: each, the largest first, goes to the shard with the most room left.

    What counts are the whole tensors' sizes, which ranks that have other parts of them see alike. All shards are as long as
    the fullest, which the collectives ask for; what the others have less is padding.
    """
    dealt: list[list[int]] = [[] for _ in range(shards)]
    sizes = [_global_size(parameter) for parameter in parameters]
    loads = [0] * shards
    for index in sorted(range(len(parameters)), key=lambda index: -sizes[index]):
        emptiest = loads.index(min(loads))
        dealt[emptiest].append(index)
        loads[emptiest] += sizes[index]
    placed = [_place([parameters[index] for index in sorted(indices)]) for indices in dealt]
    length = -(-max(end for _, end in placed) // _ALIGN) * _ALIGN
    entries: list[Entry] = []
    for shard, (own, _) in enumerate(placed):
        entries += [Entry(e.parameter, shard * length + e.start, shard * length + e.stop) for e in own]
    return entries, shards * length


def split_axes(reduce_over: str, mesh: Mesh) -> tuple[Axis, ...]:
    """The axes over whose ranks the parts of a matrix are spread, by the axis that its gradients are summed over."""
    axis = mesh.expert_tensor if reduce_over == "expert_data" else mesh.tensor
    return (axis,) if axis.size > 1 else ()


def plan_buckets(
    chunks: Sequence[nn.Module], groups: Groups, mesh: Mesh, *, zero_stage: int, bucket_bytes: float
) -> tuple[list[Bucket], dict[int, int]]:
    """Buckets of all parameters, in the order in which backward completes them (the late ones last), and how often
    each parameter occurs.

    Within a bucket: one dtype, one group, one reduction axis. A parameter that several chunks share is placed once. A bucket
    whose rule needs whole matrices gets at least as many parameters as it has shards, where there are so many.
    """
    uses: dict[int, int] = {}
    ordered: list[nn.Parameter] = []
    for chunk in chunks:
        for parameter in chunk.parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) not in uses:
                ordered.append(parameter)
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    ordered.reverse()

    open_groups: dict[tuple, list[nn.Parameter]] = {}
    finished: list[tuple[int, tuple, list[nn.Parameter]]] = []
    for position, parameter in enumerate(ordered):
        slice_ = slice_of(parameter)
        late = slice_.shared or uses[id(parameter)] > 1 or any(piece.sum_over for piece in slice_.pieces)
        updated = groups.of(slice_)
        key = (late, parameter.dtype, updated, slice_.reduce_over)
        group = open_groups.setdefault(key, [])
        group.append(parameter)
        axis = getattr(mesh, slice_.reduce_over)
        whole = updated.rule.whole_matrices
        fewest = axis.size if whole and zero_stage else 1
        size = sum(_global_size(member) if whole else member.numel() for member in group)
        if len(group) >= fewest and size * 4 >= bucket_bytes:
            finished.append((position, key, open_groups.pop(key)))
    rest: Iterable[tuple[tuple, list[nn.Parameter]]] = open_groups.items()
    places = {id(parameter): position for position, parameter in enumerate(ordered)}
    finished += [(places[id(group[-1])], key, group) for key, group in rest]
    finished.sort(key=lambda item: (item[1][0], item[0]))
    buckets = []
    for _, (late, _, updated, reduce_over), group in finished:
        axis = getattr(mesh, reduce_over)
        shards = axis.size if zero_stage else 1
        keep = zero_stage < 2 or late
        split = split_axes(reduce_over, mesh) if updated.rule.whole_matrices else ()
        buckets.append(Bucket(group, axis, shards=shards, keep_gradient=keep, late=late, group=updated, split=split))
    return buckets, uses
