"""Several ranks in one process: threads that meet at a barrier, and box lists of made-up layouts."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import Box, Piece, cut_range


class ThreadRanks:
    """One rank of a world of threads (see `megalm.checkpoint.ranks.Ranks`)."""

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank, self.size, self.shared = rank, size, shared

    def all_gather(self, value: Any) -> list[Any]:
        slots, barrier = self.shared["slots"], self.shared["barrier"]
        slots[self.rank] = value
        barrier.wait(timeout=30)
        found = list(slots)
        barrier.wait(timeout=30)
        return found

    def gather(self, value: Any) -> list[Any] | None:
        found = self.all_gather(value)
        return found if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]


def run_threads(size: int, body: Callable[[ThreadRanks], Any]) -> list[Any]:
    """`body(ranks)` on each of `size` thread ranks; their results, or the first exception."""
    shared: dict[str, Any] = {"slots": [None] * size, "barrier": threading.Barrier(size)}
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = body(ThreadRanks(rank, size, shared))
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


@dataclass(frozen=True)
class Layout:
    """A made-up layout: pipeline stages x tensor ranks x data ranks, with optimizer state cut by ZeRO or not."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: bool = False
    interleave: bool = False

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline


# name -> (shape, dimension that tensor parallelism splits, or None for replicated). "layers.N" goes by stage.
MODEL: dict[str, tuple[tuple[int, ...], int | None]] = {
    "embedding.weight": ((13, 8), None),
    **{
        f"layers.{n}.{name}": spec
        for n in range(4)
        for name, spec in {
            "attention_norm.weight": ((8,), None),
            "attention.query.weight": ((12, 8), 0),
            "attention.output.weight": ((8, 12), 1),
            "mlp.experts": ((3, 4, 8), 1),
        }.items()
    },
    "final_norm.weight": ((8,), None),
}


def reference(seed: int = 0) -> dict[str, torch.Tensor]:
    """Global tensors: weights, and both moments of each."""
    generator = torch.Generator().manual_seed(seed)
    names = ["", "optimizer.exp_avg.", "optimizer.exp_avg_sq."]
    return {p + n: torch.randn(shape, generator=generator) for n, (shape, _) in MODEL.items() for p in names}


def list_boxes_of_rank(layout: Layout, rank: int, values: dict[str, torch.Tensor] | None) -> list[Box]:
    """List what `rank` of the layout holds, with the values of `values`, or NaN to be filled.

    The tied embedding is on both ends of the pipeline; with ZeRO each data rank holds a range of the flat order,
    which begins and ends inside of tensors and rows.
    """
    tensor, rest = rank % layout.tensor, rank // layout.tensor
    data, stage = rest % layout.data, rest // layout.data
    pieces: list[Piece] = []
    for name, (shape, dim) in MODEL.items():
        stages = {"embedding.weight": {0, layout.pipeline - 1}, "final_norm.weight": {layout.pipeline - 1}}
        if name.startswith("layers."):
            number = int(name.split(".")[1])
            stages[name] = {number % layout.pipeline if layout.interleave else number * layout.pipeline // 4}
        if stage not in stages[name]:
            continue
        offset, local = [0] * len(shape), list(shape)
        if dim is not None:
            local[dim] //= layout.tensor
            offset[dim] = tensor * local[dim]
        pieces.append(Piece(name, shape, tuple(offset), tuple(local)))
    boxes: list[Box] = []
    for prefix in ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq."):
        total = sum(prod(piece.shape) for piece in pieces)
        low, high = (total * data // layout.data, total * (data + 1) // layout.data) if layout.zero else (0, total)
        at = 0
        for piece in pieces:
            size = prod(piece.shape)
            for offset_, shape_, _ in cut_range(piece, max(0, low - at), min(size, high - at)):
                source = (values or {}).get(prefix + piece.name)
                if source is None:
                    local_tensor = torch.full(shape_, float("nan"))
                else:
                    local_tensor = source
                    for d, (start, length) in enumerate(zip(offset_, shape_, strict=True)):
                        local_tensor = local_tensor.narrow(d, start, length)
                    local_tensor = local_tensor.clone()
                boxes.append(Box(prefix + piece.name, piece.global_shape, offset_, local_tensor))
            at += size
    return boxes


class FakeMesh:
    """The sizes that a checkpointer reads from a mesh."""

    def __init__(self, layout: Layout) -> None:
        single = Mesh.single()
        self.world_size = layout.world
        for axis in ("data", "tensor", "pipeline", "context", "expert"):
            size = getattr(layout, axis, 1)
            object.__setattr__(self, axis, type(single.data)(axis, size))


def assert_holds(boxes: Sequence[Box], values: dict[str, torch.Tensor]) -> None:
    """Every box has exactly the values of its part of the global tensor, bit by bit."""
    for box in boxes:
        part = values[box.name]
        for dim, (start, size) in enumerate(zip(box.offset, box.tensor.shape, strict=True)):
            part = part.narrow(dim, start, size)
        assert torch.equal(box.tensor, part), f"{box.name} at {box.offset}"
