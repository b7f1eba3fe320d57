"""What torch alone does on this GPU, before anything of this engine is built: the rates that its choices rest on.

Each finding is written as soon as it is there; one that fails is named with what it said.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PRODUCTS = {
    "1.3G": (16384, {"qkv": (6144, 2048), "out": (2048, 2048), "up": (11264, 2048), "down": (2048, 5632)}),
    "8G": (8192, {"qkv": (6144, 4096), "out": (4096, 4096), "up": (28672, 4096), "down": (4096, 14336)}),
}
"""Model -> rows of a micro-batch, and (outputs, inputs) of its layers' products."""
ATTENTION = {"1.3G": (4, 16, 16, 4096, 128), "8G": (1, 32, 8, 8192, 128)}
"""Model -> sequences, heads, key heads, positions, width of a head."""
REPEATS = 20


def main(argv: list[str] | None = None) -> int:
    """Probe; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true", help="sizes that any machine does in a moment")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    probe = Probe(torch.device(args.device), args.tiny, args.out)
    for finding in (
        probe.describe,
        probe.copies,
        probe.attention,
        probe.products,
        probe.scaled_products,
        probe.host_copies,
    ):
        try:
            finding()
        except Exception as error:  # whatever a library does here: the next finding does not depend on it
            probe.note(finding.__name__, "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return 0


def _attend_by(backend: Any, q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class Probe:
    """Findings in the order in which they are made."""

    def __init__(self, device: torch.device, tiny: bool, out: Path) -> None:
        self.device, self.tiny, self.out = device, tiny, out
        self.found: dict[str, dict[str, Any]] = {}

    def note(self, subject: str, name: str, value: Any) -> None:
        """Write one finding down."""
        self.found.setdefault(subject, {})[name] = value
        self.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        print(f"{subject} {name}: {value}", flush=True)

    def describe(self) -> None:
        """The device, the libraries, and which attention torch would take first."""
        self.note("machine", "torch", torch.__version__)
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self.note("machine", "device", f"{properties.name}, {properties.multi_processor_count} multiprocessors")
            self.note("machine", "cudnn", torch.backends.cudnn.version())
        order = getattr(torch._C, "_get_sdp_priority_order", None)
        names = {int(value): name for name, value in torch.nn.attention.SDPBackend.__members__.items()}
        self.note(
            "machine", "attention order", [names.get(int(each), str(each)) for each in order()] if order else "unknown"
        )

    def copies(self) -> None:
        """Bytes a second of a copy on the device, read and written."""
        for size in (2**29, 2**32):
            size = 2**22 if self.tiny else size
            source = torch.empty(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            seconds = self.measure(partial(target.copy_, source))
            self.note("copies", f"{size / 2**30:.3g} GiB, B/s", 2 * size / seconds)

    def attention(self) -> None:
        """Each of torch's kernels on both models' shapes: FLOP/s forward and backward, and whether the bits come again."""
        from torch.nn.attention import SDPBackend

        kinds = ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"] if self.device.type == "cuda" else []
        for model, shape in ATTENTION.items():
            batch, heads, groups, length, width = (1, 4, 2, 64, 16) if self.tiny else shape
            q, k, v = (self.draw(batch, n, length, width).requires_grad_() for n in (heads, groups, groups))
            grad = self.draw(batch, heads, length, width)
            flops = 2 * 2 * batch * heads * length * length * width / 2  # two products, half of the square
            for kind in [*kinds, "MATH"] if self.tiny else kinds:
                backend = SDPBackend.__members__[kind]

                forward = partial(_attend_by, backend, q, k, v, heads != groups)
                for strict in (False, True):
                    name = f"{model} {kind.removesuffix('_ATTENTION').lower()}{' deterministic' if strict else ''}"
                    torch.use_deterministic_algorithms(strict)
                    try:
                        self._attend(name, forward, (q, k, v), grad, flops)
                    except RuntimeError as error:
                        self.note("attention", name, f"refused: {str(error).splitlines()[0][:120]}")
                    finally:
                        torch.use_deterministic_algorithms(False)

    def _attend(
        self, name: str, forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor, flops: float
    ) -> None:
        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), leaves, grad)

        ahead, whole = self.measure(forward), self.measure(both)
        first = both()
        same = all(
            torch.equal(one, other) for _ in range(REPEATS - 1) for one, other in zip(both(), first, strict=True)
        )
        rates = {"forward": flops / ahead, "backward": 2.5 * flops / max(whole - ahead, 1e-9), "same bits": same}
        self.note("attention", name, rates)

    def products(self) -> None:
        """FLOP/s of the layers' products: forward, the input's gradient, the weight's in bf16 and added into fp32."""
        for model, (rows, sizes) in PRODUCTS.items():
            for name, (outputs, inputs) in sizes.items():
                rows, outputs, inputs = (64, 32, 16) if self.tiny else (rows, outputs, inputs)
                x, weight, grad = self.draw(rows, inputs), self.draw(outputs, inputs), self.draw(rows, outputs)
                total = torch.zeros(outputs, inputs, device=self.device)
                flops = 2.0 * rows * outputs * inputs
                rates = {
                    "forward": flops / self.measure(lambda x=x, w=weight: x @ w.t()),
                    "input's gradient": flops / self.measure(lambda g=grad, w=weight: g @ w),
                    "weight's in bf16": flops / self.measure(lambda g=grad, x=x: g.t() @ x),
                    "weight's in bf16, added": flops
                    / self.measure(lambda g=grad, x=x, total=total: total.add_(g.t() @ x)),
                }
                if self.device.type == "cuda":
                    rates["weight's into fp32"] = flops / self.measure(
                        lambda g=grad, x=x, total=total: torch.addmm(
                            total, g.t(), x, out_dtype=torch.float32, out=total
                        )
                    )
                self.note("products", f"{model} {name}", rates)

    def scaled_products(self) -> None:
        """FLOP/s of 8-bit products by tensor and by row."""
        size = 64 if self.tiny else 8192
        if self.device.type != "cuda":
            self.note("scaled_products", "skipped", "torch has them on GPUs")
            return
        a = self.draw(size, size).to(torch.float8_e4m3fn)
        b = self.draw(size, size).to(torch.float8_e4m3fn).t()
        for name, scales in {"tensor": ((), ()), "row": ((size, 1), (1, size))}.items():
            one, other = (torch.ones(shape, device=self.device) for shape in scales)
            run = lambda one=one, other=other: torch._scaled_mm(a, b, one, other, out_dtype=torch.bfloat16)  # noqa: E731
            self.note("scaled_products", name, 2.0 * size**3 / self.measure(run))

    def host_copies(self) -> None:
        """Bytes a second to the host and back, and how much host memory torch takes for one that is no power of two."""
        size = 2**20 if self.tiny else 3 * 2**29
        pinned = self.device.type == "cuda"
        here = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.note("host_copies", "to the host, B/s", size / self.measure(lambda: here.copy_(there, non_blocking=True)))
        self.note(
            "host_copies", "from the host, B/s", size / self.measure(lambda: there.copy_(here, non_blocking=True))
        )
        if pinned:
            statistics = torch.cuda.host_memory_stats()
            taken = {key: value for key, value in statistics.items() if "bytes" in key and "current" in key}
            self.note("host_copies", f"pinned for {size} bytes", taken)

    def draw(self, *shape: int) -> Tensor:
        """Random numbers in bf16: products of zeros are faster."""
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device)

    def measure(self, run: Callable[[], object], runs: int = 5) -> float:
        """Seconds of one run, the best of some, after two that are not measured."""
        for _ in range(2):
            run()
        best = math.inf
        for _ in range(1 if self.tiny else runs):
            if self.device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                best = min(best, begin.elapsed_time(end) / 1e3)
            else:
                begun = time.perf_counter()
                run()
                best = min(best, time.perf_counter() - begun)
        return best


if __name__ == "__main__":
    sys.exit(main())
