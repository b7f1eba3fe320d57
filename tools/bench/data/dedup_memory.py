"""Peak memory of deduplication, all processes together, beside what `--memory` allows.

Counted is what the system cannot take back: not the pages of files that are mapped, which it drops when it needs the room.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError

HELP = "make inputs larger than --memory, deduplicate them, and measure the memory of all processes together"
WAYS = {
    "near": [],
    "exact": [],
    "semantic": [],
    "substring": ["--bytes", "200"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ways", nargs="*", default=[], metavar="WAY", help=f"of {', '.join(WAYS)} (near exact)")
    parser.add_argument("--megabytes", type=float, default=1000, help="of each input (%(default)g)")
    parser.add_argument("--memory", type=float, default=500, metavar="MB", help="what the tool may take (%(default)g)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", help="also write the JSON to this file")


def _write(path: Path, kind: str, size: float) -> int:
    """Documents until the file has this size: `long` of 500 words, or `short` of two; every third comes again."""
    rng = np.random.default_rng(1)
    documents = 0
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            numbers = rng.integers(0, 2 * (documents + 1000), 1000).tolist()
            for number in numbers:
                words = 2 if kind == "short" else 500
                text = " ".join(f"w{(number * 7919 + k * (number % 97 + 1)) % 60_000}" for k in range(words))
                file.write(json.dumps({"text": f"{text} {number}"}) + "\n")
            documents += len(numbers)
    return documents


def measure_held(process: Any) -> int:
    """Measure bytes that a process holds besides mapped files; elsewhere than on Linux with them."""
    try:
        found = re.search(
            r"^Anonymous:\s+(\d+) kB", Path(f"/proc/{process.pid}/smaps_rollup").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else process.memory_info().rss


def _measure(command: list[str]) -> tuple[float, float]:
    """Megabytes at most, and seconds."""
    import psutil

    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "tools.dedup", *command], stdout=subprocess.DEVNULL)
    tool, most = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for one in [tool, *tool.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += measure_held(one)
        most = max(most, total)
        time.sleep(0.05)
    if process.returncode:
        raise ConfigError(f"tools.dedup {' '.join(command)} ended with {process.returncode}.")
    return most / 1e6, time.monotonic() - start


def run(args: argparse.Namespace) -> int:
    try:
        import psutil  # noqa: F401
    except ImportError as error:
        raise ConfigError("measuring the memory of processes needs psutil: `pip install psutil`.") from error
    unknown = set(args.ways) - set(WAYS)
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: choose of {', '.join(WAYS)}.")
    rows = []
    with tempfile.TemporaryDirectory(prefix="dedup-memory-") as name:
        for kind in ("long", "short"):
            source = Path(name, f"{kind}.jsonl")
            documents = _write(source, kind, args.megabytes * 1e6)
            for way in args.ways or ["near", "exact"]:
                outputs = ["--output", f"{name}/kept", "--removed", f"{name}/gone"]
                limits = ["--workers", str(args.workers), "--memory", str(args.memory)]
                peak, seconds = _measure([way, str(source), *WAYS[way], *outputs, *limits])
                rows.append({"way": way, "documents": kind, "number": documents, "peak_mb": round(peak, 1)})
                rows[-1] |= {"allowed_mb": args.memory, "seconds": round(seconds, 1), "holds": peak <= args.memory}
                print(
                    f"{way:10} {documents:9} {kind:5} documents, {args.megabytes:g} MB: {peak:7.1f} MB of "
                    f"{args.memory:g}, {seconds:.1f} s"
                )
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["holds"] for row in rows) else 1
