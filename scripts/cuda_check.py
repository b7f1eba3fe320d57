"""Compiles every CUDA kernel for each architecture and holds registers and spills to a budget. Needs nvcc, no GPU.

    python scripts/cuda_check.py [--arch 80 90 100] [--json]

Exit status 0: within the budget; 1: beyond it or does not compile; 0 with a note where there is no nvcc.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc"
# Bytes that a thread may spill to memory. Only the element-by-element forms of quantization do (up to 32 bytes on sm_80),
# which serve odd sizes; in a packed kernel a spill would cost what the packing is for.
SPILL_BUDGET = 32
# A block of 512 threads has 128 registers for each of them.
REGISTER_BUDGET = 128

KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def compile_one(nvcc: str, source: Path, architectures: list[str]) -> tuple[Path, str, bool]:
    """nvcc's report (-Xptxas -v), and whether it compiled."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{SOURCE}", "-c"]
        command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        command += ["-o", str(Path(folder, "kernel.o")), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    return source, result.stdout + result.stderr, result.returncode == 0


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    output = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    plain = [re.sub(r"^void |megalm::cuda::|\(anonymous namespace\)::", "", name) for name in output]
    return [name.split("(")[0] for name in plain]


def parse(source: Path, report: str) -> list[dict]:
    rows: list[dict] = []
    for line in report.splitlines():
        if match := KERNEL.search(line):
            rows.append({"op": source.parent.name, "kernel": match[1], "arch": match[2], "spill": 0})
        elif rows and (match := SPILL.search(line)):
            rows[-1]["stack"], rows[-1]["spill"] = int(match[1]), int(match[2]) + int(match[3])
        elif rows and (match := USED.search(line)):
            rows[-1]["registers"], rows[-1]["shared"] = int(match[1]), int(match[2] or 0)
    for row, name in zip(rows, demangle([row["kernel"] for row in rows]), strict=False):
        row["kernel"] = name
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"], help="compute capabilities, without the dot")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    args = parser.parse_args(argv)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda-check: no nvcc here, nothing was compiled.", file=sys.stderr)
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda source: compile_one(nvcc, source, args.arch), sorted(SOURCE.glob("*/*.cu"))))
    rows, failed = [], False
    for source, report, compiled in results:
        rows += parse(source, report)
        if not compiled:
            failed = True
            print(f"{source} does not compile:\n{report}", file=sys.stderr)
    over = [r for r in rows if r["spill"] > SPILL_BUDGET or r.get("registers", 0) > REGISTER_BUDGET]
    if args.json:
        print(json.dumps({"kernels": rows, "over_budget": over, "compiled": not failed}, indent=1))
    else:
        print(f"{'op':<15}{'arch':>5}{'registers':>11}{'shared':>8}{'spill':>7}  kernel")
        for r in sorted(rows, key=lambda r: (r["op"], r["kernel"], r["arch"])):
            print(
                f"{r['op']:<15}{r['arch']:>5}{r.get('registers', 0):>11}{r.get('shared', 0):>8}{r['spill']:>7}  {r['kernel']}"
            )
        print(
            f"{len(rows)} kernels, {len(over)} over the budget ({REGISTER_BUDGET} registers, {SPILL_BUDGET} bytes spilled)"
        )
    return 1 if failed or over else 0


if __name__ == "__main__":
    sys.exit(main())
