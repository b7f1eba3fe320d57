"""Initial weights depend on (seed, name, global index) and nothing else."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from megalm import ops
from megalm.parallel.initialize import derive_key, fill, initialize
from megalm.parallel.slices import Piece, Role, Slice, attach

MASK = (1 << 64) - 1


def by_definition(seed, name, index, std):
    """One value in plain Python integers, from the module's docstring."""

    def splitmix(number):
        z = (derive_key(seed, name) + (number + 1) * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    words = splitmix(2 * index), splitmix(2 * index + 1)
    total = sum((word >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48))
    scale = std * (1.0 / math.sqrt(8 * (2**32 - 1) / 3))
    return np.float32((2 * total - 8 * 65535) * scale)


def whole(name, shape, std, dtype=torch.float32):
    parameter = nn.Parameter(torch.full(shape, 7.0, dtype=dtype))
    attach(parameter, Slice((Piece(name, shape, (0,) * len(shape), shape),), Role.MATRIX, std))
    return parameter


def test_values_are_those_of_the_definition():
    parameter = whole("layers.3.mlp.up.weight", (5, 7), 0.02)
    fill(parameter, 1234)
    expected = [by_definition(1234, "layers.3.mlp.up.weight", i, 0.02) for i in range(35)]
    assert parameter.detach().flatten().tolist() == [float(v) for v in expected]


def test_every_slice_of_a_tensor_gets_the_same_values():
    shape = (12, 10, 6)
    full = whole("x", shape, 1.0)
    fill(full, 5)
    for offset, size in (
        ((0, 0, 0), (4, 10, 6)),
        ((8, 0, 0), (4, 10, 6)),
        ((3, 2, 1), (5, 7, 4)),
        ((0, 9, 5), (12, 1, 1)),
    ):
        part = nn.Parameter(torch.empty(size))
        attach(part, Slice((Piece("x", shape, offset, size),), Role.MATRIX, 1.0))
        fill(part, 5)
        window = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
        assert torch.equal(part, full[window])


def test_a_stack_holds_its_pieces_and_zero_padding():
    a, b = whole("a", (3, 4), 0.5), whole("b", (5, 4), 0.5)
    stack = nn.Parameter(torch.full((7, 4), 9.0))
    pieces = (Piece("a", (3, 4), (1, 0), (2, 4), 0), Piece("b", (5, 4), (2, 0), (3, 4), 3))
    attach(stack, Slice(pieces, Role.MATRIX, 0.5))
    for parameter in (a, b, stack):
        fill(parameter, 0)
    assert torch.equal(stack[:2], a[1:]) and torch.equal(stack[3:6], b[2:])
    assert not stack[2].any() and not stack[6].any()


def test_the_distribution_is_standard():
    parameter = whole("w", (1000, 1000), 1.0)
    fill(parameter, 0)
    values = parameter.detach().double()
    # Five standard errors of each estimate for a million draws.
    assert abs(values.mean()) < 5e-3 and abs(values.var() - 1) < 7.5e-3
    assert abs((values**3).mean()) < 0.02 and abs((values**4).mean() - (3 - 1.2 / 8)) < 0.05
    neighbours = torch.corrcoef(torch.stack([values[:, :-1].flatten(), values[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 5e-3
    other = whole("v", (1000, 1000), 1.0)
    fill(other, 0)
    assert abs(torch.corrcoef(torch.stack([values.flatten(), other.detach().double().flatten()]))[0, 1]) < 5e-3
    fill(other, 1)
    assert not torch.equal(other, parameter)


def test_ones_zeros_meta_and_rounding():
    ones, zeros = whole("a", (4,), "ones"), whole("b", (4,), 0.0)
    narrow, wide = whole("c", (64,), 1.0, torch.bfloat16), whole("c", (64,), 1.0)
    module = nn.ParameterList([ones, zeros, narrow, wide])
    initialize(module, 3)
    assert ones.eq(1).all() and zeros.eq(0).all()
    assert torch.equal(narrow, wide.to(torch.bfloat16))
    meta = attach(nn.Parameter(torch.empty(2, device="meta")), Slice((), Role.MATRIX, 1.0))
    fill(meta, 0)
    with pytest.raises(LookupError, match="no slice"):
        fill(nn.Parameter(torch.empty(3)), 0)


def test_the_compiled_function_gives_the_same_bits():
    if not ops.index.is_available():
        pytest.skip("the extension is not built")
    pieces = [
        Piece("x", (40, 30), (8, 0), (16, 30)),
        Piece("x", (40, 30), (3, 11), (20, 7)),
        Piece("y", (9, 8, 5), (2, 3, 0), (6, 4, 5)),
        Piece("z", (7, 6, 5), (1, 2, 3), (4, 3, 2)),
        Piece("b", (100,), (37,), (21,)),
    ]
    for piece in pieces:
        parameter = nn.Parameter(torch.empty(piece.shape))
        attach(parameter, Slice((piece,), Role.MATRIX, 0.5))
        fill(parameter, 9)
        compiled = parameter.detach().clone()
        with ops.use_backend("reference"):
            fill(parameter, 9)
        assert torch.equal(parameter, compiled)
