"""Fuzzes the C++ that reads text (JSON lines, sets of runs and what they have in common, suffix arrays, counts, lines),
under AddressSanitizer and UBSan.

python scripts/fuzz_text.py [--inputs N] [--seed N]        a million inputs by default: about a minute
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.build_extension import CXX_FLAGS, compiler, compiles  # noqa: E402

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
OPS = ("clean_lines", "json_lines", "minhash", "shingle", "suffix", "text_counts")
SOURCES = ("tests/csrc/fuzz_text.cpp", *(f"csrc/{op}/op.cpp" for op in OPS))


def build() -> Path:
    """The fuzzer, compiled again where a source is newer. Errors: RuntimeError without a compiler with sanitizers."""
    cxx = compiler()
    if cxx is None or not compiles(cxx, SANITIZE):
        raise RuntimeError("no C++ compiler with AddressSanitizer")
    output = ROOT / "build" / "fuzz_text"
    sources = [ROOT / name for name in SOURCES]
    headers = [ROOT / "csrc" / name for name in (*(f"{op}/op.h" for op in OPS), "common/vec.h", "common/op.h")]
    headers += [ROOT / "tests/csrc/fuzz_counts.h", *(ROOT / "csrc/text_counts").glob("*.h")]
    if not output.exists() or output.stat().st_mtime < max(path.stat().st_mtime for path in [*sources, *headers]):
        output.parent.mkdir(parents=True, exist_ok=True)
        flags = [flag for flag in CXX_FLAGS if flag != "-fPIC"]
        command = [*cxx, *flags, "-O1", "-g1", *SANITIZE, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(output)]
        subprocess.run(command, check=True)
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the random inputs (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the result as JSON to this file")
    args = parser.parse_args()
    fuzzer, start = build(), time.perf_counter()
    status = subprocess.run([str(fuzzer), str(args.inputs), str(args.seed)]).returncode
    if args.out:
        result = {
            "machine": platform.platform(), "inputs": args.inputs, "seed": args.seed, "sources": OPS, "sanitizers": SANITIZE,
            "seconds": round(time.perf_counter() - start, 1), "faults": status != 0,
        }  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
