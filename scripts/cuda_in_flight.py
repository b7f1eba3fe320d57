"""Estimates, for every packed CUDA kernel, how many bytes its loads keep on their way. Needs nvcc and nvdisasm, no GPU.

    python scripts/cuda_in_flight.py [--arch 90] [--every] [--json]

A memory's bandwidth times its latency is what must be in flight to fill it: about 40 KB on each multiprocessor of a
Hopper GPU. A thread's share is read from the machine code, in the order in which it is written down: loads count from
where they are issued to the first instruction that names one of their registers. The threads that are there together
follow from registers, shared memory and the largest block. Both leave out what only a run shows: branches, the cache,
blocks smaller than the largest. nvdisasm comes with CUDA's toolkit, and as the package nvidia-cuda-nvdisasm.
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
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.cuda_check import SOURCE, parse  # noqa: E402

# Of a multiprocessor of sm_80, sm_90 and sm_100: registers, threads, bytes of shared memory (at least), blocks.
REGISTERS, THREADS, SHARED, BLOCKS = 65536, 2048, 164 * 1024, 32

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
REGISTER = re.compile(r"(?<![A-Z])R(\d+)")
LIMIT = re.compile(r"\.entry (\w+)\(.*?\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", re.DOTALL)


def _width(opcode: str) -> int:
    """Bytes of a memory access."""
    for suffix, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if suffix in opcode:
            return width
    return 4


def loads_in_flight(code: str) -> int:
    """The most bytes that a thread has asked global memory for and not yet named: `code` is one kernel's disassembly."""
    flying: list[tuple[set[int], int]] = []  # registers of a load, its bytes
    most = 0
    for opcode, operands in INSTRUCTION.findall(code):
        load = opcode.startswith("LDG")
        width = _width(opcode) if opcode[:3] in ("LDG", "STG", "LDS", "STS") else 4
        named: set[int] = set()
        for position, found in enumerate(REGISTER.finditer(operands)):
            first = int(found[1])
            address = operands[found.end() :].startswith((".64", ".U32"))
            data = load and position == 0 or opcode[:3] in ("STG", "STS") and not address
            named |= set(range(first, first + (max(1, width // 4) if data else 2 if address else 1)))
        # Loads come back in the order of their issue: with one, all before it are there.
        waited = max((i + 1 for i, (registers, _) in enumerate(flying) if registers & named), default=0)
        del flying[:waited]
        if load:
            target = int(match[1]) if (match := REGISTER.search(operands)) else 0
            flying.append((set(range(target, target + max(1, width // 4))), width))
            most = max(most, sum(size for _, size in flying))
    return most


def resident_threads(registers: int, shared: int, block: int) -> int:
    """Threads of blocks of `block` that a multiprocessor holds together; a warp takes registers by the 8 a thread."""
    each = -(-registers // 8) * 8 * (-(-block // 32) * 32)
    blocks = min(REGISTERS // each, THREADS // block, BLOCKS, SHARED // (shared + 1024))
    return blocks * block


def examine(nvcc: str, nvdisasm: str, source: Path, architecture: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        base = [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{SOURCE}", f"-arch=sm_{architecture}"]
        # One pass for both: the code's limits of a block are in the PTX alone.
        command = [*base, "-Xptxas", "-v", "--keep", "--keep-dir", folder, "-cubin", "-o", f"{folder}/out.cubin"]
        result = subprocess.run([*command, str(source)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source} does not compile:\n{result.stdout}{result.stderr}")
        limits: dict[str, int] = {}
        for path in Path(folder).glob("*.ptx"):
            for name, x, y, z in LIMIT.findall(path.read_text()):
                limits[name] = int(x) * int(y or 1) * int(z or 1)
        listing = subprocess.run(
            [nvdisasm, "-c", f"{folder}/out.cubin"], capture_output=True, text=True, check=True
        ).stdout
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-----|\Z)", listing, re.DOTALL | re.MULTILINE))
    report = result.stdout + result.stderr
    names = re.findall(r"Compiling entry function '(\w+)'", report)
    rows = []
    for row, name in zip(parse(source, report), names, strict=True):
        block = limits.get(name, 1024)
        row["in_flight"], row["block"] = loads_in_flight(code[name]), block
        row["threads"] = resident_threads(row["registers"], row.get("shared", 0), block)
        row["kb_per_sm"] = round(row["in_flight"] * row["threads"] / 1024, 1)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="90", help="compute capability, without the dot")
    parser.add_argument("--every", action="store_true", help="also single elements, fp32 and fp16, and small kernels")
    parser.add_argument("--only", nargs="+", default=None, help="names of csrc's folders")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args(argv)
    nvcc, nvdisasm = shutil.which("nvcc"), shutil.which("nvdisasm")
    if nvcc is None or nvdisasm is None:
        print("cuda-in-flight: needs nvcc and nvdisasm (pip install nvidia-cuda-nvdisasm) in PATH.", file=sys.stderr)
        return 2
    sources = [path for path in sorted(SOURCE.glob("*/*.cu")) if not args.only or path.parent.name in args.only]
    with ThreadPoolExecutor(2) as pool:
        found = [row for rows in pool.map(lambda s: examine(nvcc, nvdisasm, s, args.arch), sources) for row in rows]
    if not args.every:  # bf16 in packs, and what has no dtype but fp32
        found = [r for r in found if "bfloat16, 8" in r["kernel"] or r["op"] in ("adamw", "sequence")]
        found = [r for r in found if r["in_flight"] >= 16]
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(
        f"{'op':<14}{'bytes/thread':>13}{'registers':>10}{'block':>6}{'threads/SM':>11}{'KB/SM':>7}  kernel (sm_{args.arch})"
    )
    for r in sorted(found, key=lambda r: (r["op"], r["kernel"])):
        print(
            f"{r['op']:<14}{r['in_flight']:>13}{r['registers']:>10}{r['block']:>6}{r['threads']:>11}{r['kb_per_sm']:>7}"
            f"  {r['kernel']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
