"""Each kernel against the plain PyTorch op, torch.compile of it and other libraries, by turns in one run."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.ops import backend, vendors
from tools.bench._kernel_cases import Case, kernel_cases
from tools.bench._kernel_peers import liger_functions

HELP = "each kernel against eager PyTorch, torch.compile, Liger, apex and TE: time, ratio, bytes moved"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("50m", "7b"), default=None, help="default: 50m on a CPU, 7b on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=None, help="CPU threads, one table each (default: 1 2)"
    )
    parser.add_argument("--only", nargs="+", default=None, help="names of ops")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each; the median is shown")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


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


def _implementations(case: Case, device: str, compiled: bool) -> dict[str, Callable[[], None]]:
    """What can be measured here, native first."""
    runners = {"native": _runner(case, case.function, "native")}
    eager = case.peers.get("torch", case.function)
    runners["eager"] = _runner(case, eager, "reference")
    if compiled and case.compiles:
        torch._dynamo.reset()
        runners["compile"] = _runner(case, torch.compile(case.peers.get("compile", eager)), "reference")
    if device == "cuda":
        op = case.name.split()[0]
        if op in (functions := liger_functions()):
            runners["liger"] = _runner(case, functions[op], "reference")
        for name in ("apex", "te"):
            if op.rstrip("_") in {f.rstrip("_") for f in vendors.load(name).functions}:
                runners[name] = _runner(case, case.function, name)
    return runners


def measure(case: Case, device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Median seconds of each implementation, taken by turns."""
    runners = _implementations(case, device, compiled)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for name, run in runners.items():
        for _ in range(3 if name == "compile" else 2):
            run()
    for _ in range(rounds):
        for name, run in runners.items():
            times[name].append(_seconds(run, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {"op": case.name, "bytes": case.bytes_moved, "seconds": median}
    result["ratio"] = {name: median[name] / median["native"] for name in median if name != "native"}
    result["bandwidth"] = case.bytes_moved / median["native"]
    return result


def run(args: argparse.Namespace, cases: Callable[[str, torch.dtype, str], Iterator[Case]] = kernel_cases) -> int:
    """Measure and print; `tools.bench.moe_kernels` brings cases of its own."""
    library = backend.library()
    if library is None:
        print(f"There are no kernels to measure: {backend.why_missing()}.")
        return 2
    if args.device == "cuda" and not (torch.cuda.is_available() and library.has_cuda):
        print("No GPU here, or megalm._C was built without CUDA: see scripts/gpu_check.sh.")
        return 2
    size = args.size or ("7b" if args.device == "cuda" else "50m")
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    kept = backend.keep_freed_memory()  # for all alike: page faults would hide the kernels
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    modes = []
    for threads in args.threads or ([1, 2] if args.device == "cpu" else [torch.get_num_threads()]):
        torch.set_num_threads(threads)
        ceiling = copy_bandwidth(args.device)
        results: list[dict[str, Any]] = []
        modes.append({"threads": threads, "copy_bandwidth": ceiling, "results": results})
        if not args.json:
            print(f"{machine}, {threads} threads, {size}, {dtype}; copy {ceiling / 1e9:.1f} GB/s")
            print(f"{'op':<30}{'native ms':>10}{'eager x':>9}{'compile x':>11}{'% of copy':>11}")
        for case in cases(size, DTYPES[dtype], args.device):
            if args.only and case.name.split()[0] not in args.only:
                continue
            results.append(measure(case, args.device, args.rounds, not args.no_compile))
            if not args.json:
                print(_line(results[-1], ceiling), flush=True)
    table = {
        "device": machine,
        "torch": torch.__version__,
        "size": size,
        "dtype": dtype,
        "keeps_freed_memory": kept,
        "modes": modes,
    }
    if args.out:
        args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(table, indent=1))
    return 0


def _line(result: dict[str, Any], ceiling: float) -> str:
    ratio = dict(result["ratio"])
    eager, compiled = ratio.pop("eager"), ratio.pop("compile", None)
    others = "".join(f"   {name} {value:.2f}x" for name, value in ratio.items())
    return (
        f"{result['op']:<30}{result['seconds']['native'] * 1e3:>10.3f}{eager:>8.2f}x"
        + (f"{compiled:>10.2f}x" if compiled else f"{'-':>11}")
        + f"{100 * result['bandwidth'] / ceiling:>10.0f}%{others}"
    )
