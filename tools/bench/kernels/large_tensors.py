"""Ops on tensors of more than 2^31 elements: the last rows must be what they are by themselves."""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megalm import ops
from megalm.ops import backend

HELP = "ops on tensors of more than 2^31 elements, their last rows compared (about 14 GB of memory)"

WIDTH = 1024
ROWS = 2**31 // WIDTH + 8
TAIL = 8
# Bytes: two tensors of bf16, and what is made on the way.
NEEDED = 14 * 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=None, help="names of ops")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _halves(device: str) -> Tensor:
    """bf16 [ROWS, WIDTH] of small numbers that differ from row to row near the end."""
    x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device=device).fill_(0.5)
    x[-TAIL:] = torch.randn(TAIL, WIDTH, device=device)
    x[2**31 // WIDTH - 4 : 2**31 // WIDTH + 4] = torch.randn(8, WIDTH, device=device)
    return x


def _checks(device: str) -> dict[str, Callable[[], float]]:
    """By op: the largest difference between the tail of the whole's result and the tail's own."""
    weight = torch.rand(WIDTH, device=device).bfloat16()

    def rows(function: Callable[[Tensor], Tensor]) -> float:
        x = _halves(device)
        return _difference(function(x)[-TAIL:], function(x[-TAIL:].clone()))

    def rotary() -> float:
        x = _halves(device).view(ROWS, 1, 8, WIDTH // 8)
        angles = torch.rand(ROWS, 1, 1, WIDTH // 16, device=device)
        cos, sin = angles.cos(), angles.sin()
        del angles
        want = ops.rotary(x[-TAIL:].clone(), cos[-TAIL:], sin[-TAIL:])
        return _difference(ops.rotary_(x, cos, sin)[-TAIL:], want)

    def dropout() -> float:
        x = _halves(device)
        ids = torch.arange(ROWS - TAIL, ROWS, device=device)
        tail = ops.bias_dropout_add(x[-TAIL:].clone(), p=0.5, seed=3, row_ids=ids)
        return _difference(ops.bias_dropout_add(x, p=0.5, seed=3)[-TAIL:], tail)

    def cross_entropy() -> float:
        x = _halves(device)
        labels = torch.arange(ROWS, device=device) % WIDTH
        return _difference(ops.cross_entropy(x, labels)[-TAIL:], ops.cross_entropy(x[-TAIL:].clone(), labels[-TAIL:]))

    def cross_entropy_gradient() -> float:
        x = _halves(device)
        tail = x[-TAIL:].clone().requires_grad_()
        labels = torch.arange(ROWS, device=device) % WIDTH
        (want,) = torch.autograd.grad(ops.cross_entropy(tail, labels[-TAIL:]).sum(), [tail])
        x.requires_grad_()
        (got,) = torch.autograd.grad(ops.cross_entropy(x, labels, inplace_backward=True).sum(), [x])
        return _difference(got[-TAIL:], want)

    def softmax() -> float:
        batch = 2**31 // (WIDTH * WIDTH) + 1
        x = torch.zeros(batch, 1, WIDTH, WIDTH, dtype=torch.bfloat16, device=device)
        x[-1] = torch.randn(1, WIDTH, WIDTH, device=device)
        return _difference(ops.causal_softmax(x)[-1:], ops.causal_softmax(x[-1:].clone()))

    def norm() -> float:
        x = _halves(device)
        whole = ops.l2_norm_nonfinite([x])[0]
        parts = sum(ops.l2_norm_nonfinite([part])[0] for part in x.split(ROWS // 4))
        return abs(float((whole - parts) / parts))

    return {
        "rms_norm": lambda: rows(lambda x: ops.rms_norm(x, weight, 1e-5)),
        "add_layer_norm": lambda: rows(lambda x: ops.add_layer_norm(x, x, weight, weight, 1e-5)[0]),
        "swiglu": lambda: rows(ops.swiglu),
        "bias_gelu": lambda: rows(lambda x: ops.bias_gelu(x, weight)),
        "rotary_": rotary,
        "bias_dropout_add": dropout,
        "causal_softmax": softmax,
        "cross_entropy": cross_entropy,
        "cross_entropy gradient": cross_entropy_gradient,
        "l2_norm_nonfinite": norm,
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def measure_available_bytes() -> int:
    """Memory that can be had without swapping; where the system does not say, as much as is needed."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return NEEDED


def run(args: argparse.Namespace) -> int:
    if args.device == "cpu" and measure_available_bytes() < NEEDED:
        print(f"{measure_available_bytes() / 1e9:.0f} GB of memory are free, about {NEEDED / 1e9:.0f} are needed.")
        return 2
    results = {}
    with backend.use_backend("native"):
        for name, check in _checks(args.device).items():
            if args.only and name.split()[0] not in args.only:
                continue
            begun = time.perf_counter()
            results[name] = check()
            gc.collect()
            if not args.json:
                verdict = "equal" if results[name] <= 1e-6 else f"DIFFERENT by {results[name]:.3g}"
                print(f"{name:<24}{verdict:<24}{time.perf_counter() - begun:>7.1f} s", flush=True)
    if args.json:
        print(json.dumps(results))
    return 0 if all(value <= 1e-6 for value in results.values()) else 1
