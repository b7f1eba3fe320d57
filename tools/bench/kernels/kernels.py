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

from ._cases import SIZES, Case, list_kernel_cases
from ._peers import find_liger_functions

HELP = "each kernel against eager PyTorch, torch.compile, Liger, apex and TE: time, ratio, bytes moved"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default=None, help="default: 50m on a CPU, 7b on a GPU")
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


def _waits(run: Callable[[], object]) -> bool:
    """Whether it makes the host wait for the device. A graph of that fails, and torch's allocator would be left as if the
    capture went on."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


# Runs in a graph, each behind a pass over more memory than a GPU's cache holds: their inputs come from memory.
_GRAPH_RUNS, _FLUSH_BYTES = 5, 256 * 2**20


class _Timer:
    """Seconds of one run.

    On a GPU from a graph of `_GRAPH_RUNS` runs, less what the passes between them take: most kernels are shorter than
    what Python needs to start them. What cannot be captured (`captured` is then False) is timed as it is started.
    """

    def __init__(self, run: Callable[[], object], device: str) -> None:
        self.run, self.device = run, device
        self.captured = False
        if device != "cuda":
            return
        self.flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        if _waits(run):
            return
        try:
            self.graph, self.passes = self._capture(run), self._capture(lambda: None)
            self.captured = True
        except RuntimeError:
            torch.cuda.synchronize()

    def _capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_GRAPH_RUNS):
                self.flushed.zero_()
                run()
        return graph

    def __call__(self) -> float:
        if self.captured:
            return (_seconds(self.graph.replay, "cuda") - _seconds(self.passes.replay, "cuda")) / _GRAPH_RUNS
        if self.device == "cuda":
            self.flushed.zero_()
        return _seconds(self.run, self.device)


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a copy, reading and writing counted: the ceiling of all that only moves memory."""
    # On a GPU half a GiB reads 4% low: starting and ending take their part.
    source = torch.empty((1024 if device == "cuda" else 64) * 2**20, device=device).normal_()
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
        if op in (functions := find_liger_functions()):
            runners["liger"] = _runner(case, functions[op], "reference")
        for name in ("apex", "te"):
            if op.rstrip("_") in {f.rstrip("_") for f in vendors.load(name).functions}:
                runners[name] = _runner(case, case.function, name)
    return runners


def measure(case: Case, device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Median seconds of each implementation, taken by turns. One that fails is named in `failed` and left out."""
    timers: dict[str, _Timer] = {}
    failed: dict[str, str] = {}
    for name, run in _implementations(case, device, compiled).items():
        try:
            for _ in range(3 if name == "compile" else 2):
                run()
            timers[name] = _Timer(run, device)
        except Exception as error:  # a peer's, or torch.compile's, of any kind
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    median = {name: statistics.median(values) for name, values in times.items()}
    result: dict[str, Any] = {"op": case.name, "bytes": case.bytes_moved, "seconds": median, "failed": failed}
    if device == "cuda":
        result["timed_by_python"] = [name for name, timer in timers.items() if not timer.captured]
    if "native" in median:
        result["ratio"] = {name: median[name] / median["native"] for name in median if name != "native"}
        result["bandwidth"] = case.bytes_moved / median["native"]
    return result


def run(args: argparse.Namespace, cases: Callable[[str, torch.dtype, str], Iterator[Case]] = list_kernel_cases) -> int:
    """Measure and print; `tools.bench.kernels.moe_kernels` brings cases of its own."""
    library = backend.find_library()
    if library is None:
        print(f"There are no kernels to measure: {backend.explain_missing()}.")
        return 2
    if args.device == "cuda" and not (torch.cuda.is_available() and library.has_cuda):
        print("No GPU here, or megalm._C was built without CUDA: see scripts/gpu_check.sh.")
        return 2
    size = args.size or ("7b" if args.device == "cuda" else "50m")
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    kept = backend.keep_freed_memory()  # for all alike: page faults would hide the kernels
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    modes: list[dict[str, Any]] = []
    table = {
        "device": machine,
        "torch": torch.__version__,
        "size": size,
        "dtype": dtype,
        "keeps_freed_memory": kept,
        "modes": modes,
    }
    complete = True
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
            complete = complete and "native" in results[-1]["seconds"]
            if args.out:  # after each line: what comes later may not come at all
                args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            if not args.json:
                print(_line(results[-1], ceiling), flush=True)
    if args.json:
        print(json.dumps(table, indent=1))
    return 0 if complete else 1


def _line(result: dict[str, Any], ceiling: float) -> str:
    failed = "".join(f"   {name} failed: {why[:100]}" for name, why in result["failed"].items())
    if "native" not in result["seconds"]:
        return f"{result['op']:<30}{'-':>10}{failed}"
    ratio = dict(result["ratio"])
    eager, compiled = (f"{ratio.pop(name):.2f}x" if name in ratio else "-" for name in ("eager", "compile"))
    others = "".join(f"   {name} {value:.2f}x" for name, value in ratio.items())
    return (
        f"{result['op']:<30}{result['seconds']['native'] * 1e3:>10.3f}{eager:>9}{compiled:>11}"
        f"{100 * result['bandwidth'] / ceiling:>10.0f}%{others}{failed}"
    )
