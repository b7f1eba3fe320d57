"""Slices: cutting flat ranges of pieces into boxes."""

import itertools

import torch
from torch import nn

from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Piece, Role, Slice, attach, cut_range, list_boxes, slice_of, tie


def test_any_range_of_a_piece_is_covered_once_by_boxes():
    for shape, offset in (((7,), (3,)), ((4, 5), (2, 0)), ((3, 1), (0, 4)), ((2, 3, 4), (1, 0, 2)), ((1, 6), (0, 0))):
        size = torch.Size(shape).numel()
        piece = Piece("x", tuple(o + s for o, s in zip(offset, shape, strict=True)), offset, shape)
        numbers = torch.arange(size).view(shape)
        for start, stop in itertools.combinations(range(size + 1), 2):
            covered = []
            for where, extent, first in cut_range(piece, start, stop):
                window = tuple(slice(w - o, w - o + e) for w, o, e in zip(where, offset, extent, strict=True))
                inside = numbers[window].flatten().tolist()
                # A box is a contiguous run of the flat range, so that a view of it exists.
                assert inside == list(range(first, first + len(inside)))
                covered += inside
            assert covered == list(range(start, stop))


def test_an_empty_range_has_no_box():
    assert list(cut_range(Piece("x", (4, 4), (0, 0), (4, 4)), 5, 5)) == []


def test_boxes_of_a_module_are_views():
    stack = nn.Parameter(torch.zeros(5, 2))
    pieces = (Piece("a", (4, 2), (2, 0), (2, 2), 0), Piece("b", (9, 2), (6, 0), (3, 2), 2))
    attach(stack, Slice(pieces, Role.MATRIX))
    boxes = {box.name: box for box in list_boxes(nn.ParameterList([stack]))}
    boxes["b"].tensor.fill_(3.0)
    assert stack[:2].eq(0).all() and stack[2:].eq(3).all()
    assert boxes["a"].offset == (2, 0) and boxes["b"].global_shape == (9, 2)


def test_tied_copies_have_one_owner_and_sum_their_gradients():
    for rank in (0, 1):
        axis = Axis("pipeline_ends", 2, rank, (0, 3))
        parameter = attach(
            nn.Parameter(torch.zeros(2, 2)), Slice((Piece("e", (2, 2), (0, 0), (2, 2)),), Role.EMBEDDING)
        )
        tie(parameter, axis)
        piece = slice_of(parameter).pieces[0]
        assert piece.owner == (rank == 0) and piece.sum_over == (axis,)
    alone = attach(nn.Parameter(torch.zeros(1)), Slice((Piece("e", (1,), (0,), (1,)),), Role.EMBEDDING))
    before = slice_of(alone)
    assert slice_of(tie(alone, Axis("pipeline_ends"))) is before
