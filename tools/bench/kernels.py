"""Each kernel against the plain PyTorch op and torch.compile of it, by turns in one run."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalm import ops
from megalm.ops import backend
from megalm.ops.adamw import adamw_reference_
from megalm.ops.gradient_norm import l2_norm_nonfinite_reference

HELP = "each kernel against eager PyTorch and torch.compile: time, ratio, bytes moved"

# (tokens, hidden, ffn, vocabulary, heads, head size): the 50M Llama shape of the training benchmark, and the 7b model's.
SIZES = {"50m": (2048, 512, 1408, 32000, 8, 64), "7b": (4096, 4096, 11008, 50432, 32, 128)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default=None, help="default: 50m on a CPU, 7b on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--only", nargs="+", default=None, help="names of ops")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each; the median is shown")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


@dataclass
class Case:
    """One line: what is called, on what, and how many bytes it must move.

    peers: further implementations by name, for ops that have no gradient and choose no backend by themselves.
    compiles: whether torch.compile can take its eager form.
    """

    name: str
    function: Callable[..., Any]
    inputs: list[Any]
    bytes_moved: int
    gradients: list[Tensor] | None = None
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    compiles: bool = True


def _cases(size: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    tokens, hidden, ffn, vocabulary, heads, head = SIZES[size]
    width = dtype.itemsize

    def rand(*shape: int, leaf: bool = True) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(leaf)

    row = tokens * hidden * width
    norm = [rand(tokens, hidden), rand(hidden), 1e-5]
    yield Case("rms_norm", ops.rms_norm, norm, 2 * row)
    yield Case("rms_norm backward", ops.rms_norm, norm, 5 * row, [rand(tokens, hidden, leaf=False)])
    add = [rand(tokens, hidden), rand(tokens, hidden), rand(hidden), 1e-5]
    grads = [rand(tokens, hidden, leaf=False), rand(tokens, hidden, leaf=False)]
    yield Case("add_rms_norm", ops.add_rms_norm, add, 4 * row)
    yield Case("add_rms_norm backward", ops.add_rms_norm, add, 8 * row, grads)
    layer = [rand(tokens, hidden), rand(tokens, hidden), rand(hidden), rand(hidden), 1e-5]
    yield Case("add_layer_norm backward", ops.add_layer_norm, layer, 8 * row, grads)

    q = rand(tokens // 4, 4, heads, head)
    angles = torch.rand(tokens // 4, 1, 1, head // 2, device=device)
    turn = [q, angles.cos(), angles.sin()]
    each = q.numel() * width
    yield Case("rotary", ops.rotary, turn, 2 * each)
    yield Case("rotary backward", ops.rotary, turn, 4 * each, [rand(*q.shape, leaf=False)])

    gated, flow = [rand(tokens, 2 * ffn)], [rand(tokens, ffn, leaf=False)]
    part = tokens * ffn * width
    for name in ("swiglu", "geglu"):
        yield Case(name, getattr(ops, name), gated, 3 * part)
        yield Case(f"{name} backward", getattr(ops, name), gated, 8 * part, flow)
    yield Case("bias_gelu backward", ops.bias_gelu, [rand(tokens, ffn), rand(ffn)], 5 * part, flow)

    logits, labels = rand(tokens, vocabulary), torch.randint(0, vocabulary, (tokens,), device=device)
    every, weight = tokens * vocabulary * width, torch.ones(tokens, device=device)
    peers = {"torch": lambda x, y: torch.nn.functional.cross_entropy(x.float(), y, reduction="none")}
    yield Case("cross_entropy", ops.cross_entropy, [logits, labels], every, peers=peers)
    yield Case("cross_entropy backward", ops.cross_entropy, [logits, labels], 3 * every, [weight], peers=peers)

    count = 16 * 2**20
    state = [torch.rand(count, device=device) for _ in range(4)]
    options: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

    def fused(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        torch._fused_adamw_(
            [w], [g], [m], [v], [], [torch.tensor(3.0, device=device)], amsgrad=False, maximize=False, **options
        )

    yield Case(
        "adamw",
        lambda *t: ops.adamw_(*t, step=3, **options),
        state,
        28 * count,
        peers={"torch": fused, "compile": lambda *t: adamw_reference_(*t, step=3, **options)},
    )
    flat = torch.randn(count, device=device)
    yield Case(
        "l2_norm_nonfinite",
        lambda x: ops.l2_norm_nonfinite([x]),
        [flat],
        4 * count,
        peers={
            "torch": lambda x: (torch.linalg.vector_norm(x), torch.isfinite(x).logical_not_().sum()),
            "compile": lambda x: l2_norm_nonfinite_reference([x], x.device),
        },
    )


def _runner(case: Case, function: Callable[..., Any], choice: str) -> Callable[[], None]:
    """One forward without gradient, or one forward and backward."""
    leaves = [i for i in case.inputs if isinstance(i, Tensor) and i.requires_grad]

    def run() -> None:
        with backend.use_backend(choice):
            if case.gradients is None:
                with torch.no_grad():
                    function(*case.inputs)
                return
            outputs = function(*case.inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(case.gradients, outputs, strict=True)])

    return run


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a copy, reading and writing counted: the ceiling of all that only moves memory."""
    source = torch.empty(64 * 2**20, device=device).normal_()
    target = torch.empty_like(source)
    times = [_seconds(lambda: target.copy_(source), device) for _ in range(9)]
    return 2 * source.nbytes / min(times[2:])


def measure(case: Case, device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Median seconds of each implementation, taken by turns."""
    runners = {"native": _runner(case, case.function, "native")}
    eager = case.peers.get("torch", case.function)
    runners["eager"] = _runner(case, eager, "reference")
    if compiled and case.compiles:
        torch._dynamo.reset()
        plain = case.peers.get("compile", eager)
        runners["compile"] = _runner(case, torch.compile(plain), "reference")
    times: dict[str, list[float]] = {name: [] for name in runners}
    for name, run in runners.items():
        for _ in range(3 if name == "compile" else 2):
            run()
        times[name].clear()
    for _ in range(rounds):
        for name, run in runners.items():
            times[name].append(_seconds(run, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {"op": case.name, "bytes": case.bytes_moved, "seconds": median}
    result["ratio"] = {name: median[name] / median["native"] for name in median if name != "native"}
    result["bandwidth"] = case.bytes_moved / median["native"]
    return result


def run(args: argparse.Namespace, cases: Callable[[str, torch.dtype, str], Iterator[Case]] = _cases) -> int:
    """Measure and print; `tools.bench.moe_kernels` brings cases of its own."""
    if backend.library() is None:
        print("The extension megalm._C is not built here: run `make build` first.")
        return 2
    if args.device == "cuda" and not (torch.cuda.is_available() and backend.library().has_cuda):  # type: ignore[union-attr]
        print("No GPU here, or megalm._C was built without CUDA: see scripts/gpu_check.sh.")
        return 2
    size = args.size or ("7b" if args.device == "cuda" else "50m")
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    kept = backend.keep_freed_memory()  # for all alike: page faults would hide the kernels
    ceiling = copy_bandwidth(args.device)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    head = {
        "device": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": size,
        "dtype": dtype,
        "copy_bandwidth": ceiling,
        "keeps_freed_memory": kept,
    }
    if not args.json:
        print(f"{machine}, {head['threads']} threads, {size}, {dtype}; copy {ceiling / 1e9:.1f} GB/s")
        print(f"{'op':<30}{'native ms':>10}{'eager x':>9}{'compile x':>11}{'% of copy':>11}")
    results = []
    for case in cases(size, DTYPES[dtype], args.device):
        if args.only and case.name.split()[0] not in args.only:
            continue
        result = measure(case, args.device, args.rounds, not args.no_compile)
        results.append(result)
        if not args.json:
            ratio = result["ratio"]
            compiled = f"{ratio['compile']:>10.2f}x" if "compile" in ratio else f"{'-':>11}"
            print(
                f"{case.name:<30}{result['seconds']['native'] * 1e3:>10.3f}{ratio['eager']:>8.2f}x{compiled}"
                f"{100 * result['bandwidth'] / ceiling:>10.0f}%",
                flush=True,
            )
    if args.json:
        print(json.dumps({**head, "results": results}, indent=1))
    return 0
