"""The mixture's and the 8-bit kernels, and Megatron's indices, against plain PyTorch and numpy, by turns in one run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalm import ops

from . import kernels
from .kernels import Case

HELP = "router, permute, grouped product, fp8 and Megatron's indices against PyTorch, torch.compile and numpy"

# (tokens, hidden, expert's ffn, experts, top_k): a small mixture for a CPU, and one layer of a 7B-wide model for a GPU.
SIZES = {
    "tiny": (64, 32, 48, 4, 2),
    "50m": (2048, 512, 704, 32, 4),
    "1b": (16384, 2048, 1408, 32, 4),
    "7b": (8192, 4096, 1408, 64, 6),
}
SAMPLES = 200_000  # of the blend, whose other form is a Python loop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kernels.add_arguments(parser)


def _cases(size: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    tokens, hidden, ffn, experts, top_k = SIZES[size]
    width, slots = dtype.itemsize, tokens * top_k

    def rand(*shape: int, leaf: bool = True) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(leaf)

    logits = torch.randn(tokens, experts, device=device).requires_grad_()
    each, chosen = logits.numel() * 4, slots * 12

    def route(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = ops.moe_router(x, top_k, normalize=True)
        return routing.weights, routing.probability, routing.log_z

    flows = [torch.randn(s, device=device) for s in ((tokens, top_k), (experts,), (tokens,))]
    yield Case("moe_router", route, [logits], each + chosen)
    yield Case("moe_router backward", route, [logits], 3 * each + 2 * chosen, flows)

    picked = ops.moe_router(logits.detach(), top_k).experts
    row_map = ops.moe_row_map(picked, experts)
    yield Case("moe_row_map", lambda e: ops.moe_row_map(e, experts), [picked], 24 * slots)

    row = hidden * width
    permute_bytes = (tokens + slots) * row
    x, y = rand(tokens, hidden), rand(slots, hidden)
    weights = torch.rand(tokens, top_k, device=device).requires_grad_()
    grad_x, grad_y = [rand(tokens, hidden, leaf=False)], [rand(slots, hidden, leaf=False)]
    yield Case("moe_permute", lambda t: ops.moe_permute(t, row_map), [x], permute_bytes)
    yield Case("moe_permute backward", lambda t: ops.moe_permute(t, row_map), [x], 2 * permute_bytes, grad_y)
    back = lambda t, w: ops.moe_unpermute(t, row_map, w)  # noqa: E731
    yield Case("moe_unpermute", back, [y, weights], permute_bytes)
    yield Case("moe_unpermute backward", back, [y, weights], 2 * permute_bytes + slots * row, grad_x)

    weight = rand(experts, ffn, hidden)
    product = (slots * (hidden + ffn) + weight.numel()) * width
    grouped = lambda t, w: ops.grouped_mm(t, w, row_map.counts)  # noqa: E731
    flow = [rand(slots, ffn, leaf=False)]
    yield Case("grouped_mm", grouped, [y, weight], product, compiles=False)
    yield Case("grouped_mm backward", grouped, [y, weight], 3 * product, flow, compiles=False)

    flat = rand(tokens, hidden * top_k, leaf=False)
    scale, count = torch.ones(1, device=device), flat.numel()
    kinds: dict[str, dict[str, Any]] = {
        "fp8_quantize": {"scale": scale},
        "fp8_quantize+transpose": {"scale": scale, "transpose": True},
        "fp8_quantize 1x128+transpose": {"block": (1, 128), "transpose": True},
        "fp8_quantize 128x128": {"block": (128, 128)},
    }
    for name, options in kinds.items():
        written = 2 if "transpose" in options else 1
        # All of the answer, or torch.compile leaves out what is not looked at; with blocks and transposition inductor
        # of torch 2.13 stops in an assertion.
        run = lambda t, o=options: [part for part in ops.fp8_quantize(t, **o) if part is not None]  # noqa: E731
        yield Case(name, run, [flat], count * (width + written), compiles="1x128" not in name)
    q = ops.fp8_quantize(flat, block=(1, 128))
    undo = lambda d, s: ops.fp8_dequantize(d, s, block=(1, 128), dtype=dtype)  # noqa: E731
    yield Case("fp8_dequantize 1x128", undo, [q.data, q.scale_inv], count * (width + 1))

    if device != "cpu":
        return
    # Here, since a machine that is there for its GPU alone need not have what the data package imports.
    from megalm.data import megatron_order

    shares = [0.4, 0.3, 0.2, 0.1]
    python = (np.empty(SAMPLES, np.int16), np.empty(SAMPLES, np.int64))
    yield Case(
        "blend",
        lambda: megatron_order.blend(shares, SAMPLES),
        [],
        10 * SAMPLES,
        peers={"torch": lambda: megatron_order._blend_step_by_step(shares, *python)},
        compiles=False,
    )
    random = np.random.RandomState(0)
    sizes = random.randint(1, 2000, 1_000_000).astype(np.int64)
    order, length = np.arange(len(sizes), dtype=np.int32), 4096
    random.shuffle(order)
    samples = (int(sizes.sum()) - 1) // length
    yield Case(
        "sample_starts",
        lambda: megatron_order.sample_starts(sizes, order, 0, samples, length),
        [],
        12 * len(sizes) + 16 * samples,
        peers={"torch": lambda: megatron_order._walk_starts(sizes, order, 0, samples, length)},
        compiles=False,
    )


def run(args: argparse.Namespace) -> int:
    return kernels.run(args, _cases)
