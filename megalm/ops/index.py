"""Integer functions on the host: initial weights and keyed permutations. Contract: csrc/index/op.h.

Both give the bits of the numpy functions that define them (megalm/parallel/initialize.py, megalm/data/order.py), which
call these where `is_available()`.
"""

from __future__ import annotations

import numpy as np

from megalm.ops.backend import find_library, get_backend, get_library, require


def is_available() -> bool:
    """Whether the compiled functions may be used."""
    return find_library() is not None and get_backend() != "reference"


def fill(out: np.ndarray, key: int, scale: float, *, first: int = 0, stride: int = 0) -> None:
    """Initial values into `out`: row r holds the global elements first + r * stride, and those that follow.

    Shapes: out fp32 [rows, columns] contiguous
    """
    require(
        out.ndim == 2 and out.dtype == np.float32 and out.flags.c_contiguous and out.flags.writeable,
        f"index.fill: out is {out.dtype} {out.shape}; it must be writable contiguous float32 [rows, columns].",
    )
    get_library().fill(key, first, stride, out.shape[0], out.shape[1], scale, out.ctypes.data)


def permute(index: np.ndarray, size: int, key: int | np.ndarray) -> np.ndarray:
    """Where each index goes under the permutation of [0, size) that `key` chooses.

    Shapes: index [N] integers in [0, size); key one number or uint64 [N] -> int64 [N]
    """
    require(size >= 1, f"index.permute: size={size}; it must be at least 1.")
    flat = np.ascontiguousarray(index, dtype=np.int64)
    require(
        flat.size == 0 or (int(flat.min()) >= 0 and int(flat.max()) < size),
        f"index.permute: index reaches outside [0, {size}).",
    )
    keys = np.ascontiguousarray(key, dtype=np.uint64).reshape(-1)
    require(keys.size in (1, flat.size), f"index.permute: {keys.size} keys for {flat.size} indices.")
    out = np.empty_like(flat)
    one_key = keys.size == 1
    get_library().permute(size, flat.size, one_key, flat.ctypes.data, keys.ctypes.data, out.ctypes.data)
    return out
