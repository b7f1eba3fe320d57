"""Initial weights as a pure function of (seed, global name, global index): the same on every layout and every machine.

    key     = first 8 bytes of blake2b("seed/name")
    h1, h2  = splitmix64 outputs 2 i and 2 i + 1 of the state `key`, for the global row-major index i
    value   = std * (sum of the eight 16-bit parts of h1 and h2, centred and scaled to variance 1)

The sum of eight uniforms is close to normal, bounded by 4.9 standard deviations, and exact in integers: nothing
depends on a mathematics library. One product in float64 and one rounding to the parameter's dtype follow.
Source of the hash: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import nn

from megalm.ops import index
from megalm.parallel.slices import Piece, slice_of, view_piece

_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1
# Variance of 2 * sum - 8 * 65535 for eight independent uniforms on 0 .. 65535: 4 * 8 * (2^32 - 1) / 12.
_SCALE = 1.0 / math.sqrt(8 * (2**32 - 1) / 3)
# Elements at a time: the working set (a dozen 8-byte words each) stays in a core's cache.
_CHUNK = 1 << 14


def derive_key(seed: int, name: str) -> int:
    """The 64-bit key of a global tensor's values."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64's output function, in place."""
    shifted = state >> np.uint64(30)
    state ^= shifted
    state *= np.uint64(_MIX1)
    np.right_shift(state, np.uint64(27), out=shifted)
    state ^= shifted
    state *= np.uint64(_MIX2)
    np.right_shift(state, np.uint64(31), out=shifted)
    state ^= shifted
    return state


def _centred(key: int, index: np.ndarray) -> np.ndarray:
    """Integers of mean 0 for global indices (uint64): twice the sum of eight 16-bit uniforms, minus its mean."""
    lanes = np.uint64(0x0000FFFF0000FFFF)
    state = index * np.uint64(2 * _GAMMA & _WORD)
    state += np.uint64((key + _GAMMA) & _WORD)
    second = state + np.uint64(_GAMMA)
    total: np.ndarray | None = None
    for word in (_mix(state), _mix(second)):
        low = word & lanes
        word >>= np.uint64(16)
        word &= lanes
        low += word
        total = low if total is None else np.add(total, low, out=total)
    assert total is not None
    high = total >> np.uint64(32)
    total &= np.uint64(0xFFFFFFFF)
    total += high
    centred = total.view(np.int64)
    centred *= 2
    centred -= 8 * 65535
    return centred


def draw_values(seed: int, piece: Piece, std: float) -> Iterator[tuple[int, np.ndarray]]:
    """Draw the piece's initial values in row-major order, as (first element, float32 values) chunks."""
    key, scale = derive_key(seed, piece.name), std * _SCALE
    total = prod(piece.shape)
    if not total:
        return
    whole_rows = piece.shape[1:] == piece.global_shape[1:]
    row_global = prod(piece.global_shape[1:])
    first_global = piece.offset[0] * row_global
    for start in range(0, total, _CHUNK):
        local = np.arange(start, min(start + _CHUNK, total), dtype=np.uint64)
        if whole_rows:
            place_of = local + np.uint64(first_global)
        else:
            place_of = np.zeros_like(local)
            stride = 1
            for size, offset, extent in zip(
                reversed(piece.shape), reversed(piece.offset), reversed(piece.global_shape), strict=True
            ):
                local, place = np.divmod(local, np.uint64(size))
                place_of += (place + np.uint64(offset)) * np.uint64(stride)
                stride *= extent
        yield start, (_centred(key, place_of) * scale).astype(np.float32)


@torch.no_grad()
def fill(parameter: nn.Parameter, seed: int, std: float | str | None = None) -> None:
    """Set a parameter to its initial values; padding rows become zero.

    std: standard deviation, 0.0 for zeros, or "ones"; None: what its slice says. A meta parameter is left alone.
    """
    slice_ = slice_of(parameter)
    std = slice_.initial if std is None else std
    if parameter.device.type == "meta":
        return
    if std == "ones":
        parameter.fill_(1.0)
        return
    parameter.zero_()
    if std == 0.0:
        return
    for piece in slice_.pieces:
        host = torch.empty(piece.shape, dtype=torch.float32)
        _write(host.view(piece.shape[0], -1).numpy(), seed, piece, float(std))
        view_piece(parameter, piece).copy_(host)


def _write(out: np.ndarray, seed: int, piece: Piece, std: float) -> None:
    """The piece's initial values into out, fp32 [rows, elements of a row], by the compiled function where there is
    one."""
    inner = prod(piece.global_shape[2:])
    if index.is_available() and piece.shape[2:] == piece.global_shape[2:] and out.size:
        stride = prod(piece.global_shape[1:])
        first = piece.offset[0] * stride + (piece.offset[1] * inner if len(piece.offset) > 1 else 0)
        index.fill(out, derive_key(seed, piece.name), std * _SCALE, first=first, stride=stride)
        return
    flat = out.reshape(-1)
    for start, chunk in draw_values(seed, piece, std):
        flat[start : start + chunk.size] = chunk


def initialize(module: nn.Module, seed: int) -> None:
    """`fill` every parameter of a module by what its slice says."""
    for parameter in module.parameters():
        fill(parameter, seed)
