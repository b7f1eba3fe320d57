"""A fixed matrix product whose right answer is known: what computes it wrongly, trains wrongly.

Its numbers are small integers, so that every sum is exact in fp32, in whatever order it is taken: the same bits on every
device, with any library and any number of threads.
"""

from __future__ import annotations

import torch
import xxhash

SIZE = 512
"""Rows and columns; a product of two such takes milliseconds."""
_LARGEST = 8


def is_exact(device: torch.device) -> bool:
    """True where the device multiplies as it should, in fp32 and in bf16."""
    return all(hash_product(device, dtype) == hash_expected() for dtype in (torch.float32, torch.bfloat16))


def hash_product(device: torch.device, dtype: torch.dtype) -> str:
    """Multiply the fixed matrices in this dtype; the xxh3 of the product's exact integers."""
    left, right = (matrix.to(device, dtype) for matrix in _make_matrices())
    if dtype is not torch.bfloat16:
        return _hash(left @ right)
    halves = (
        torch.chunk(left, SIZE // 4, dim=1),
        torch.chunk(right, SIZE // 4, dim=0),
    )  # sums of 4 products: exact in bf16, too
    return _hash(torch.stack([a @ b for a, b in zip(*halves, strict=True)]).to(torch.float32).sum(0))


def hash_expected() -> str:
    """The same by whole numbers, on the CPU."""
    left, right = _make_matrices()
    return _hash((left.to(torch.int64) @ right.to(torch.int64)).to(torch.float32))


def _make_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -8 to 8, by a rule that needs no generator. Shapes: -> [SIZE, SIZE] twice"""
    numbers = torch.arange(SIZE * SIZE, dtype=torch.int64)
    span = 2 * _LARGEST + 1
    made = [((numbers * factor + (numbers >> 7)) % span - _LARGEST).view(SIZE, SIZE) for factor in (7919, 104729)]
    return made[0], made[1]


def _hash(product: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(product.to("cpu", torch.float32).contiguous().numpy().tobytes())
