"""Update rules that see a matrix as a whole, wherever its parts are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from megalm.optim.rules.rule import Rule, Update
from megalm.optim.stretches import Part, Stretch
from megalm.parallel import collectives
from megalm.parallel.slices import Piece


class WholeMatrixRule(Rule):
    """w = w (1 - lr decay) - lr transform(prepare(gradient, states)), with `transform` of the whole matrix.

    Under ZeRO each matrix lies on one data rank (`plan_buckets` sees to it). Where ranks hold parts of one (tensor and
    expert-tensor parallelism, fully_shard), the prepared parts are put together on all of them, each matrix is transformed
    by one of them, and its result is given to all: the same bits on every layout.

    Comm: over each axis that splits tensors two all-reduces a bucket, of the whole matrices in fp32
    """

    whole_matrices = True

    @abstractmethod
    def prepare(self, gradient: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Take the gradient into the states, elementwise and in place; what comes back is transformed."""

    @abstractmethod
    def transform(self, matrix: Tensor) -> Tensor:
        """The update at learning rate 1 (to be subtracted). Shapes: [m, n] -> the same; zeros give zeros"""

    def transform_all(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The same of several, each by itself."""
        return [self.transform(matrix) for matrix in matrices]

    def count_blocks(self, piece: Piece) -> int:
        """Blocks of equal numbers of rows that a tensor is cut into, each of which is transformed by itself."""
        return 1

    @abstractmethod
    def cost(self, shape: Sequence[int]) -> float:
        """How much work `transform` is, in any unit."""

    @abstractmethod
    def expected_size(self, shape: Sequence[int]) -> float:
        """Root mean square of the update at learning rate 1, which is known before it is made."""

    def step(self, part: Part, update: Update) -> None:
        prepared = self.prepare(part.gradient() * update.grad_scale, part.state)
        direction = torch.zeros_like(part.master)
        if not part.split:
            moved = self._transform_tensors(
                [s.view(prepared) for s in part.stretches], [s.piece for s in part.stretches]
            )
            for s, result in zip(part.stretches, moved, strict=True):
                s.view(direction).copy_(result)
        else:
            self._transform_together(part, prepared, direction)
        self.move(part, direction, update.lr)

    def sample(self, parts: Sequence[Part], places: Sequence[Tensor], step: int, scale: float) -> Tensor:
        """As expected: nothing has to be transformed for it."""
        found = []
        for part, where in zip(parts, places, strict=True):
            sizes = torch.zeros_like(part.master)
            for s in part.stretches:
                sizes[s.start : s.stop] = self.expected_size(self._find_block(s.piece))
            found.append(sizes[where])
        return torch.cat(found)

    def _find_block(self, piece: Piece) -> tuple[int, ...]:
        rows, *columns = piece.global_shape
        return (rows // self.count_blocks(piece), *columns)

    def _transform_tensors(self, tensors: Sequence[Tensor], pieces: Sequence[Piece]) -> list[Tensor]:
        """Whole tensors, cut into their blocks and put together again."""
        counts = [self.count_blocks(piece) for piece in pieces]
        blocks = [block for tensor, n in zip(tensors, counts, strict=True) for block in tensor.chunk(n)]
        moved = iter(self.transform_all(blocks))
        return [next(moved) if n == 1 else torch.cat([next(moved) for _ in range(n)]) for n in counts]

    def _transform_together(self, part: Part, prepared: Tensor, direction: Tensor) -> None:
        """Fill `direction` with this rank's parts of the transformed matrices."""
        sizes = [prod(piece.global_shape) for piece in part.pieces]
        flat = torch.zeros(sum(sizes), dtype=prepared.dtype, device=prepared.device)
        whole = [values.view(piece.global_shape) for values, piece in zip(flat.split(sizes), part.pieces, strict=True)]
        places = {piece.name: matrix for piece, matrix in zip(part.pieces, whole, strict=True)}
        for s in part.stretches:
            if s.piece.owner:
                _place_of(s, places[s.piece.name]).copy_(_values_of(s, prepared))
        for axis in part.split:
            collectives.all_reduce(flat, axis)
        costs = [self.count_blocks(piece) * self.cost(self._find_block(piece)) for piece in part.pieces]
        owners = deal(costs, part.split[0].size)
        own = [place for place, owner in enumerate(owners) if owner == part.split[0].rank]
        moved = self._transform_tensors([whole[place] for place in own], [part.pieces[place] for place in own])
        flat.zero_()
        for place, result in zip(own, moved, strict=True):
            whole[place].copy_(result)
        collectives.all_reduce(flat, part.split[0])
        for s in part.stretches:
            _values_of(s, direction).copy_(_place_of(s, places[s.piece.name]))


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that each piece of work goes to: the heaviest first, to the one with the least."""
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def _rows_of(s: Stretch) -> tuple[int, int]:
    """The rows of its piece that a stretch holds: shards of a matrix end where rows end."""
    row = _row_length(s.piece)
    return s.skip // row, (s.skip + s.stop - s.start) // row


def _row_length(piece: Piece) -> int:
    return prod(piece.shape[1:])


def _place_of(s: Stretch, whole: Tensor) -> Tensor:
    """Where the stretch lies in the whole tensor."""
    low, high = _rows_of(s)
    part = whole[s.piece.offset[0] + low : s.piece.offset[0] + high]
    return part[:, s.piece.offset[1] : s.piece.offset[1] + s.piece.shape[1]] if whole.dim() == 2 else part


def _values_of(s: Stretch, flat: Tensor) -> Tensor:
    """The stretch's elements of a flat buffer, as rows."""
    return flat[s.start : s.stop].view(-1, *s.piece.shape[1:])
