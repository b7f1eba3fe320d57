"""Sum of squares and non-finite count of many tensors. Contract: csrc/gradient_norm/op.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, find_address, find_vendor, get_library, place, use_native


def l2_norm_nonfinite_reference(tensors: Sequence[Tensor], device: torch.device | str) -> Tensor:
    result = torch.zeros(2, dtype=torch.float64, device=device)
    for tensor in tensors:
        result[0] += tensor.double().square().sum()
        result[1] += torch.isfinite(tensor).logical_not_().sum()
    return result


def _add(result: Tensor, x: Tensor) -> None:
    """result += [sum of squares, non-finite elements]."""
    library = get_library()
    size = x.numel()
    blocks = -(-size // library.GRADIENT_NORM_BLOCK)
    partial = torch.empty(2 * blocks, dtype=torch.float64, device=result.device)
    library.gradient_norm(
        *place(x), DTYPE_CODES[x.dtype], size, find_address(x), find_address(partial), find_address(result)
    )


_ADD = torch.library.custom_op("megalm::l2_norm_nonfinite_", _add, mutates_args=("result",))
_ADD.register_fake(lambda result, x: None)


@torch.no_grad()
def l2_norm_nonfinite(tensors: Sequence[Tensor], device: torch.device | str | None = None) -> Tensor:
    """[sum of squares, number of NaN or infinite elements] over all tensors, in one reading of each.

    The sum is NaN or infinite when an element is; its order does not depend on the number of threads.

    Shapes: tensors of any shape -> fp64 [2], on `device` (by default the first tensor's; the CPU without tensors)
    """
    if device is None:
        device = tensors[0].device if tensors else "cpu"
    other = find_vendor("l2_norm_nonfinite", tensors[0]) if tensors else None
    if other is not None and all(t.device == tensors[0].device and t.dtype == tensors[0].dtype for t in tensors):
        return other(list(tensors)).to(device)
    result = torch.zeros(2, dtype=torch.float64, device=device)
    rest = []
    for tensor in tensors:
        if tensor.device != result.device or not use_native("l2_norm_nonfinite", tensor=tensor):
            rest.append(tensor)
            continue
        (_ADD if torch.compiler.is_compiling() else _add)(result, tensor.contiguous())
    return result + l2_norm_nonfinite_reference(rest, result.device) if rest else result
