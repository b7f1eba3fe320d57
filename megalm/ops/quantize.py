"""8-bit floats: quantize with amax and transposition in one pass, dequantize, delayed scaling. Contract: csrc/quantize/op.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, find_address, get_library, place, require, use_native

TILE = 128
_FORMATS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
Block = tuple[int, int] | None
"""What shares a scale: so many rows and columns, -1 columns being all of them; None: the whole tensor."""
WHOLE_ROW, MICROSCALED = (1, -1), (1, 32)
_BLOCKS: dict[Block, int] = {None: 0, (1, TILE): 1, (TILE, TILE): 2}
_PLAIN_BLOCKS = (WHOLE_ROW, MICROSCALED)
"""Blocks that plain PyTorch alone serves."""
_LARGEST_SCALE = 2.0**126  # its inverse is still a normal fp32 number


class Quantized(NamedTuple):
    """x ~ data * scale_inv, block by block.

    data [M, N] 8-bit; scale_inv fp32 [1], or [ceil(M / h), ceil(N / w)] for blocks of h x w; data_t [N, M] and scale_inv_t
    are those of the transposed tensor, None if it was not asked for; amax fp32 [1] for one block, else None.
    """

    data: Tensor
    scale_inv: Tensor
    data_t: Tensor | None
    scale_inv_t: Tensor | None
    amax: Tensor | None


def fp8_scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """largest / amax, at most 2^126; 1 where amax is 0, infinite or NaN. Shapes: fp32 [..] -> fp32 [..]"""
    usable = (amax > 0) & amax.isfinite()
    # number / tensor would be two roundings: a reciprocal, then a product.
    largest = amax.new_full((), torch.finfo(dtype).max)
    scale = (largest / torch.where(usable, amax, 1.0)).clamp(max=_LARGEST_SCALE)
    if power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(usable, scale, 1.0)


# ------------------------------------------------------------------------------------------------------------ reference
def _amax_reference(x: Tensor, height: int, width: int) -> Tensor:
    """Largest magnitude of each height x width block. Shapes: [M, N] -> fp32 [ceil(M / height), ceil(N / width)]"""
    width = x.shape[1] if width < 0 else width
    down, across = -(-x.shape[0] // height), -(-x.shape[1] // width) if width else 0
    whole = torch.nn.functional.pad(x.float().abs(), (0, across * width - x.shape[1], 0, down * height - x.shape[0]))
    return whole.view(down, height, across, width).amax((1, 3))


def _spread_out(scale: Tensor, shape: torch.Size, height: int, width: int) -> Tensor:
    width = shape[1] if width < 0 else width
    return scale.repeat_interleave(height, 0)[: shape[0]].repeat_interleave(width, 1)[:, : shape[1]]


def _cast_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype)


def fp8_quantize_reference(
    x: Tensor,
    dtype: torch.dtype,
    block: Block,
    scale: Tensor | None,
    power_of_two: bool,
    transpose: bool,
) -> Quantized:
    if block is None:
        amax = x.float().abs().amax().view(1) if x.numel() else x.new_zeros(1, dtype=torch.float32)
        scale = fp8_scale(amax, dtype, power_of_two) if scale is None else scale
        data = _cast_reference(x, scale, dtype)
        inverse = 1 / scale
        return Quantized(
            data, inverse, data.t().contiguous() if transpose else None, inverse if transpose else None, amax
        )
    scale = fp8_scale(_amax_reference(x, *block), dtype, power_of_two)
    data = _cast_reference(x, _spread_out(scale, x.shape, *block), dtype)
    if not transpose:
        return Quantized(data, 1 / scale, None, None, None)
    if block[0] == block[1]:
        return Quantized(data, 1 / scale, data.t().contiguous(), (1 / scale).t(), None)
    turned = fp8_quantize_reference(x.t(), dtype, block, None, power_of_two, False)
    return Quantized(data, 1 / scale, turned.data, turned.scale_inv, None)


def fp8_dequantize_reference(data: Tensor, scale_inv: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    scale = scale_inv if block is None else _spread_out(scale_inv, data.shape, *block)
    return (data.float() * scale).to(dtype)


def _count_blocks(x: Tensor, height: int, width: int) -> tuple[int, int]:
    rows, columns = x.shape
    return -(-rows // height), 1 if width < 0 else -(-columns // width)


# --------------------------------------------------------------------------------------------------------------- native
def _blocks(x: Tensor, kind: int) -> tuple[int, int]:
    rows, columns = x.shape
    across = -(-columns // TILE)
    return (1, 1) if kind == 0 else (rows, across) if kind == 1 else (-(-rows // TILE), across)


def _quantize_fake(
    x: Tensor, dtype: torch.dtype, kind: int, scale: Tensor | None, power_of_two: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """data, scale_inv, data_t, scale_inv_t, amax; what the kind does not have is empty."""
    rows, columns = x.shape
    own = kind == 1 and transpose
    return (
        x.new_empty((rows, columns), dtype=dtype),
        x.new_empty((1,) if kind == 0 else _blocks(x, kind), dtype=torch.float32),
        x.new_empty((columns, rows) if transpose else (0,), dtype=dtype),
        x.new_empty((columns, -(-rows // TILE)) if own else (0,), dtype=torch.float32),
        x.new_empty((1,) if kind == 0 else (0,), dtype=torch.float32),
    )


def _quantize(
    x: Tensor, dtype: torch.dtype, kind: int, scale: Tensor | None, power_of_two: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found, where = get_library(), place(x)
    outputs = _quantize_fake(x, dtype, kind, scale, power_of_two, transpose)
    out, scale_inv, out_t, scale_inv_t, amax = outputs
    (rows, columns), count, format_, block = x.shape, x.numel(), _FORMATS[dtype], kind
    partial = None
    if kind == 0:
        if scale is None:
            scale = torch.empty_like(amax)
            partial = x.new_empty(-(-count // found.AMAX_CHUNK), dtype=torch.int32)
            found.fp8_amax(
                *where,
                DTYPE_CODES[x.dtype],
                format_,
                power_of_two,
                count,
                find_address(x),
                find_address(amax),
                find_address(scale),
                find_address(partial),
            )
        partial = x.new_empty(-(-rows // TILE) * -(-columns // TILE), dtype=torch.int32)
        torch.reciprocal(scale, out=scale_inv)
    found.fp8_quantize(
        *where,
        DTYPE_CODES[x.dtype],
        format_,
        block,
        power_of_two,
        rows,
        columns,
        find_address(x),
        find_address(scale),
        find_address(out),
        find_address(out_t) if transpose else 0,
        find_address(scale_inv),
        find_address(scale_inv_t),
        find_address(amax),
        find_address(partial),
    )
    return outputs


def _dequantize(data: Tensor, scale_inv: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    out = _dequantize_fake(data, scale_inv, kind, dtype)
    (rows, columns), q, format_, block = data.shape, find_address(data), _FORMATS[data.dtype], kind
    get_library().fp8_dequantize(
        *place(data),
        DTYPE_CODES[dtype],
        format_,
        block,
        rows,
        columns,
        q,
        find_address(scale_inv),
        find_address(out),
    )
    return out


def _dequantize_fake(data: Tensor, scale_inv: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty(data.shape, dtype=dtype)


_QUANTIZE = torch.library.custom_op("megalm::fp8_quantize", _quantize, mutates_args=())
_QUANTIZE.register_fake(_quantize_fake)
_DEQUANTIZE = torch.library.custom_op("megalm::fp8_dequantize", _dequantize, mutates_args=())
_DEQUANTIZE.register_fake(_dequantize_fake)


def _check_format(op: str, name: str, dtype: torch.dtype) -> None:
    require(dtype in _FORMATS, f"{op}: {name} is {dtype}; it must be torch.float8_e4m3fn or torch.float8_e5m2.")


def _check_block(op: str, block: Block) -> None:
    require(
        block in _BLOCKS or block in _PLAIN_BLOCKS,
        f"{op}: block={block}; it must be None (the whole tensor), (1, -1) (a row), (1, 32), (1, 128) or (128, 128).",
    )


@torch.no_grad()
def fp8_quantize(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    block: Block = None,
    scale: Tensor | None = None,
    power_of_two: bool = False,
    transpose: bool = False,
) -> Quantized:
    """To 8-bit floats: to nearest, ties to even, saturating; the same bits on every device.

    block: what shares a scale: the whole tensor, (1, -1) (a row), (1, 32), (1, 128) or (128, 128); (1, -1) and (1, 32) have no
        kernel. scale: for the whole tensor, the one to use: x is then read once; without it twice. power_of_two: scales lose
        their mantissa, so that scaling rounds nothing.
    transpose: write x transposed as well, in the same pass; with (1, 128) blocks it has its own along its own rows.
    Infinity becomes the largest finite number, NaN stays NaN; a block whose amax is not finite has scale 1. No gradient.

    Shapes: x [M, N], scale fp32 [1] -> Quantized
    Source: Micikevicius et al. 2022 (arXiv:2209.05433)
    """
    require(x.dim() == 2, f"fp8_quantize: x has shape {tuple(x.shape)}; it must be [rows, columns].")
    _check_format("fp8_quantize", "dtype", dtype)
    _check_block("fp8_quantize", block)
    if scale is not None:
        require(block is None, f"fp8_quantize: scale is for the whole tensor, and block={block} has scales of its own.")
        require(
            scale.dtype == torch.float32 and scale.numel() == 1 and scale.device == x.device,
            f"fp8_quantize: scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}; it must be one float32 on "
            f"{x.device}.",
        )
        scale = scale.reshape(1)
    if block in _PLAIN_BLOCKS or not use_native("fp8_quantize", x=x):
        return fp8_quantize_reference(x, dtype, block, scale, power_of_two, transpose)
    run = _QUANTIZE if torch.compiler.is_compiling() else _quantize
    kind = _BLOCKS[block]
    data, scale_inv, data_t, scale_inv_t, amax = run(x.contiguous(), dtype, kind, scale, power_of_two, transpose)
    amax = amax if kind == 0 else None
    if not transpose:
        return Quantized(data, scale_inv, None, None, amax)
    return Quantized(data, scale_inv, data_t, (scale_inv, scale_inv_t, scale_inv.t())[kind], amax)


@torch.no_grad()
def fp8_dequantize(
    data: Tensor,
    scale_inv: Tensor,
    *,
    block: Block = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """data * scale_inv, rounded once to `dtype`. Shapes: data 8-bit [M, N], scale_inv as in `Quantized` -> [M, N]"""
    require(data.dim() == 2, f"fp8_dequantize: data has shape {tuple(data.shape)}; it must be [rows, columns].")
    _check_format("fp8_dequantize", "data", data.dtype)
    _check_block("fp8_dequantize", block)
    wanted = (1,) if block is None else _count_blocks(data, *block)
    require(
        tuple(scale_inv.shape) == wanted and scale_inv.dtype == torch.float32 and scale_inv.device == data.device,
        f"fp8_dequantize: scale_inv is {scale_inv.dtype} {tuple(scale_inv.shape)} on {scale_inv.device}; it must be "
        f"float32 {list(wanted)} on {data.device}.",
    )
    # An empty tensor of the output's kind stands for it: the kernel is chosen by what it writes.
    if block in _PLAIN_BLOCKS or not use_native("fp8_dequantize", dtype=data.new_empty(0, dtype=dtype)):
        return fp8_dequantize_reference(data, scale_inv, block, dtype)
    kind, run = _BLOCKS[block], _DEQUANTIZE if torch.compiler.is_compiling() else _dequantize
    return run(data.contiguous(), scale_inv.contiguous(), kind, dtype)


class DelayedScale:
    """A tensor's scale from the largest amax of its last `length` steps: x can then be quantized in one reading.

    x beyond what was seen before saturates; `margin` leaves 2^margin of room. Until an amax is recorded the scale is 1.

    Source: Micikevicius et al. 2022 (arXiv:2209.05433), sec. 3.3
    """

    def __init__(
        self, dtype: torch.dtype, *, length: int = 16, margin: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        _check_format("DelayedScale", "dtype", dtype)
        require(length >= 1, f"DelayedScale: length={length}; it must be at least 1.")
        self.dtype, self.margin = dtype, margin
        self.history = torch.zeros(length, dtype=torch.float32, device=device)
        self.scale = torch.ones(1, dtype=torch.float32, device=device)

    @torch.no_grad()
    def record(self, amax: Tensor) -> None:
        """Takes in the amax of a step, reduced over the ranks that share the tensor; one that is not finite is left out.
        Waits for no device. Shapes: amax fp32 [1]"""
        self.history = self.history.roll(1)
        self.history[:1] = torch.where(amax.isfinite(), amax, 0.0)
        self.scale = fp8_scale(self.history.amax().view(1) * 2.0**self.margin, self.dtype)
