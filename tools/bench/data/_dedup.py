"""Near-duplicates and repeated spans beside what others use; subjects of `tools/bench data`."""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

# Lee et al.'s tool (github.com/google-research/deduplicate-text-datasets, its README): LM1B, about 4 GB of bytes, in
# 2.1 CPU-hours from text to the list of repeats
RUST_TOOL_MB_PER_CPU_S = 4000 / (2.1 * 3600)


def make_labelled(texts: list[str], documents: int) -> list[str]:
    """Make documents, half of them copies of others with a share of their words replaced: none, 1, 2, 4 or 8 in a hundred."""
    rng = random.Random(7)
    originals = texts[: documents - documents // 2]
    copies = []
    for _ in range(documents // 2):
        parts = rng.choice(originals).split(" ")
        share = rng.choice([0.0, 0.01, 0.02, 0.04, 0.08])
        copies.append(" ".join(f"w{rng.randrange(10**6)}" if rng.random() < share else part for part in parts))
    mixed = [*originals, *copies]
    rng.shuffle(mixed)
    return mixed


def measure_near(
    args: argparse.Namespace, folder: Path, timed: Callable[[list[str]], dict[str, float]]
) -> dict[str, Any]:
    """From JSON lines to the list of what goes, start-up included; what comes out against all pairs compared."""
    from . import _dedup_peers as peers

    source = folder / "labelled.jsonl"
    texts = [json.loads(line)["text"] for line in open(args.text, encoding="utf-8")]  # noqa: SIM115
    if not args.as_it_is:
        texts = make_labelled(texts, min(args.documents, 2 * len(texts)))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    truth, pairs = peers.find_by_brute_force(str(source))
    sides: dict[str, list[str]] = {}
    result: dict[str, Any] = {"documents": len(texts), "megabytes": source.stat().st_size / 1e6, "true_pairs": pairs}
    own = [sys.executable, "-m", "tools.dedup", "near", str(source), "--workers", "1", "--removed"]
    sides["megalm"] = [*own, str(folder / "megalm")]
    for name in ("rensa", "datatrove"):
        try:
            result[f"{name}_version"] = metadata.version(name)
            sides[name] = [sys.executable, "-m", "tools.bench.data._dedup_peers", name, str(source), str(folder / name)]
        except metadata.PackageNotFoundError:
            result[name] = "not installed"
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, command in sides.items():
            measured[name].append(timed(command)["cpu_s"])
    rows = [json.loads(line) for line in (folder / "megalm").read_text().splitlines()]
    gone = {"megalm": {row["number"] for row in rows}}
    gone |= {name: set(json.loads((folder / name).read_text())) for name in sides if name != "megalm"}
    for name, times in measured.items():
        right = len(gone[name] & truth)
        result[name] = {
            "documents_per_cpu_s": round(len(texts) / median(times), 1),
            "removed": len(gone[name]),
            "recall": round(right / max(len(truth), 1), 4),
            "precision": round(right / max(len(gone[name]), 1), 4),
        }
        if name != "megalm":
            ratio = result["megalm"]["documents_per_cpu_s"] / result[name]["documents_per_cpu_s"]
            result[f"ratio_{name}"] = round(ratio, 1)
    return result


def measure_substring(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Megabytes of bytes per processor second: the suffix array alone (beside divsufsort), and all to the list of spans."""
    import numpy as np

    from megalm.corpus.dedup.substring import find_repeated_token_spans
    from megalm.corpus.suffix import build_suffix_array
    from megalm.data.tokens import TokenFile, TokenWriter

    content = args.text.read_bytes()[: int(args.substring_megabytes * 1e6)]
    text = np.frombuffer(content, np.uint8).copy()
    with TokenWriter(folder / "bytes", np.uint8) as writer:
        for line in content.splitlines(keepends=True):
            writer.add_document(np.frombuffer(line, np.uint8))
    file = TokenFile(folder / "bytes")
    sides: dict[str, Callable[[], Any]] = {
        "suffix_array": lambda: build_suffix_array(text),
        "to_spans": lambda: find_repeated_token_spans(file, 100),
    }
    result: dict[str, Any] = {"megabytes": len(text) / 1e6}
    try:
        from pydivsufsort import divsufsort

        sides["divsufsort"] = lambda: divsufsort(text)
        result["pydivsufsort_version"] = metadata.version("pydivsufsort")
    except ImportError as error:
        result["divsufsort"] = f"not installed ({error})"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, function in sides.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    speed = {name: len(text) / 1e6 / median(values) for name, values in times.items()}
    result["mb_per_cpu_s"] = {name: round(value, 2) for name, value in speed.items()}
    result["rust_tool_as_published_mb_per_cpu_s"] = round(RUST_TOOL_MB_PER_CPU_S, 2)
    result["ratio_to_spans"] = round(speed["to_spans"] / RUST_TOOL_MB_PER_CPU_S, 1)
    return result
