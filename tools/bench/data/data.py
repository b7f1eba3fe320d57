"""Data tools against what others use, alternating in one run: tokenizing, loading, start-up, order."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from megalm.tokenizer.encoder import FAST_BACKENDS, FastLibraryMissing, import_fast_library

from . import _dedup as _dedup_bench

HELP = "tokenizing, loading, start-up, order and deduplication, against what others use, alternating in one run"
SUBJECTS = ("tokenize", "loader", "startup", "order", "dedup", "substring")
SIZES = (10**7, 10**8, 10**9, 10**10, 10**11)  # bytes of the token files whose opening is timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "subjects", nargs="*", choices=[*SUBJECTS, []], help=f"some of {', '.join(SUBJECTS)}; default: all"
    )
    parser.add_argument(
        "--text", type=Path, help="JSON lines with a text field; default: the python-corpus of tools/tokenize"
    )
    parser.add_argument(
        "--megabytes", type=float, default=100.0, help="text to tokenize, repeated up to this size (%(default)g)"
    )
    parser.add_argument("--tokenizer", help="tokenizer.json; default: a byte-level BPE of 8192 trained on the text")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes of both sides (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (%(default)s)")
    parser.add_argument("--seq-length", type=int, default=2048, help="of the samples that are loaded (%(default)s)")
    parser.add_argument(
        "--documents", type=int, default=3000, help="in which near-duplicates are searched (%(default)s)"
    )
    parser.add_argument(
        "--as-it-is",
        action="store_true",
        help="search for near-duplicates in --text itself, in place of documents with altered copies made of it",
    )
    parser.add_argument(
        "--substring-megabytes", type=float, default=30.0, help="text searched for repeated spans (%(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    measures = {
        "tokenize": _tokenize,
        "loader": _loader,
        "startup": _startup,
        "order": _order,
        "dedup": _dedup,
        "substring": _substring,
    }
    result: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        if set(args.subjects or SUBJECTS) - {"startup", "order"}:
            _prepare(args, folder)
        for subject in args.subjects or SUBJECTS:
            result[subject] = measures[subject](args, folder)
            if not args.json:
                print(json.dumps({subject: result[subject]}, indent=1))
    if args.json:
        print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _prepare(args: argparse.Namespace, folder: Path) -> None:
    from megalm.corpus.python_corpus import choose_python_files
    from megalm.corpus.tokenize_corpus import Settings
    from megalm.corpus.tokenize_job import Job, run_job

    if args.text is None:
        args.text = folder / "text.jsonl"
        with open(args.text, "w", encoding="utf-8") as file:
            for piece in choose_python_files():
                file.write(json.dumps({"text": Path(piece.path).read_text(encoding="utf-8")}) + "\n")
    if not {"tokenize", "loader"} & set(args.subjects or SUBJECTS):
        return
    train = None if args.tokenizer else 8192
    job = Job((str(args.text),), str(folder / "one"), Settings(args.tokenizer or ""), train, workers=args.workers)
    args.tokenizer = run_job(job).tokenizer


def _timed(command: list[str]) -> dict[str, float]:
    """Wall and processor seconds of a program and its children, and the memory that they take together at most."""
    before, start, most = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            status = process.wait(0.25)
            break
        except subprocess.TimeoutExpired:
            most = max(most, _memory_mb(process.pid))
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        raise subprocess.CalledProcessError(status, command)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "memory_mb": most}


def _memory_mb(pid: int) -> float:
    """Of a process and all below it; what several share is counted once (PSS)."""
    total = 0.0
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, StopIteration):  # it has just ended
        return total
    return total + sum(_memory_mb(int(child)) for child in children)


def _tokenize(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole tool, from JSON lines to .bin/.idx, start-up included; the same bytes must come out of both sides."""
    source = folder / "long.jsonl"
    content = args.text.read_bytes()
    with open(source, "wb") as file:
        while file.tell() < args.megabytes * 1e6:
            file.write(content)
    size = source.stat().st_size / 1e6
    runs: dict[str, list[dict[str, float]]] = {"megalm": [], "one document a call": []}
    for number in range(args.repeats):
        ours, theirs = folder / f"ours{number}", folder / f"theirs{number}"
        command = [
            sys.executable,
            "-m",
            "tools.tokenize",
            str(source),
            "--tokenizer",
            args.tokenizer,
            "--output",
            str(ours),
        ]
        runs["megalm"].append(_timed([*command, "--workers", str(args.workers)]))
        command = [sys.executable, "-m", "tools.bench.data._peers", str(source), args.tokenizer, str(theirs)]
        runs["one document a call"].append(_timed([*command, str(args.workers)]))
    ours_bytes, theirs_bytes = Path(f"{ours}_text_document.bin").read_bytes(), Path(f"{theirs}.bin").read_bytes()
    outcome = json.loads(Path(f"{ours}_recipe.json").read_text(encoding="utf-8"))["outcome"]
    result: dict[str, Any] = {"megabytes": size, "workers": args.workers, "same_bytes": ours_bytes == theirs_bytes}
    result["encoded_by"] = outcome["backend"]
    if absent := _absent_fast_libraries():
        result["not_there"] = absent
    for name, measured in runs.items():
        result[name] = {
            "mb_per_s": round(size / median(r["wall_s"] for r in measured), 2),
            "mb_per_cpu_s": round(size / median(r["cpu_s"] for r in measured), 2),
        }
    for unit in ("mb_per_s", "mb_per_cpu_s"):
        result[f"ratio_{unit}"] = round(result["megalm"][unit] / result["one document a call"][unit], 2)
    result["memory_mb"] = round(max(r["memory_mb"] for r in runs["megalm"]))
    return result


def _absent_fast_libraries() -> dict[str, str]:
    """The faster encoders that cannot take part, with the reason."""
    absent = {}
    for name in FAST_BACKENDS:
        try:
            import_fast_library(name)
        except FastLibraryMissing as error:
            absent[name] = str(error)
    return absent


def _dedup(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return _dedup_bench.measure_near(args, folder, _timed)


def _substring(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return _dedup_bench.measure_substring(args, folder)


def _config(prefix: str, seq_length: int, batch: int) -> Any:
    from megalm.config import Config

    config = Config()
    config.data.train, config.data.holdout, config.data.prefetch = [prefix], 0.0, 2
    config.model.seq_length, config.model.vocab_size = seq_length, 1 << 31
    config.train.global_batch_size = config.train.micro_batch_size = batch
    return config


class _Alone:
    size, rank = 1, 0


def _loader(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A shuffled epoch of batches of 32 samples, in samples per second of processor time; page cache warm."""
    from megalm.data.loader import Loader

    from . import _peers as peers

    prefix, batch = str(folder / "one"), 32
    loader = Loader(_config(prefix, args.seq_length, batch), _Alone())
    steps = loader.sources[0].num_samples // batch

    def ours() -> int:
        return sum(sum(len(b.tokens) for b in loader.next()) for _ in range(steps))

    sides = {"megalm": ours, "megatron_style_map": peers.open_megatron_style(prefix, folder, args.seq_length, batch)}
    result: dict[str, Any] = {"seq_length": args.seq_length, "samples_per_epoch": steps * batch}
    others = {
        "litdata": ("litdata", peers.open_litdata),
        "mosaicml_streaming": ("mosaicml-streaming", peers.open_mosaicml_streaming),
        "megatron_core": ("megatron-core", peers.open_megatron_core),
    }
    for name, (package, open_epoch) in others.items():
        try:
            sides[name] = open_epoch(prefix, folder, args.seq_length, batch)
            result[f"{name}_version"] = metadata.version(package)
        except ImportError as error:
            result[name] = f"not installed ({error})"
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, function in sides.items():
            measured[name].append(peers.measure(function))
    loader.close()
    result["samples_per_cpu_s"] = {name: round(median(values)) for name, values in measured.items()}
    return result


def make_sparse_token_file(prefix: Path, size: int, documents: int = 10_000) -> None:
    """Make a token file of this many bytes that takes hardly any room: the tokens are a hole in the file."""
    import numpy as np

    from megalm.data.tokens import HEADER, MAGIC

    each = size // 2 // documents
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(each * documents * 2)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        file.write(np.full(documents, each, "<i4").tobytes())
        file.write((np.arange(documents, dtype="<i8") * each * 2).tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())


def _startup(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds from the configuration to the first batch, by the size of a (sparse) token file; nothing of it is in
    memory at the start, and each time other samples come first."""
    from megalm.data.loader import Loader

    prefixes = {}
    for size in SIZES:
        prefixes[size] = folder / f"sparse{size}"
        make_sparse_token_file(prefixes[size], size, max(1000, size // 50_000))
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    for number in range(2 * max(args.repeats, 3) + 1):
        for size, prefix in prefixes.items():
            _forget(prefix)
            config = _config(str(prefix), args.seq_length, 8)
            config.train.seed = number
            start = time.perf_counter()
            loader = Loader(config, _Alone())
            loader.next()
            times[size].append(time.perf_counter() - start)
            loader.close()
    result = {f"{size / 1e6:g} MB": round(median(values[1:]) * 1e3, 2) for size, values in times.items()}
    return {"milliseconds_to_first_batch": result}  # the first round loads the libraries


def _forget(prefix: Path) -> None:
    for ending in (".bin", ".idx"):
        file = os.open(f"{prefix}{ending}", os.O_RDONLY)
        os.fsync(file)  # what is not written yet cannot be dropped
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _order(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Processor seconds for a million consecutive positions of a mixture of three sources."""
    import numpy as np

    from megalm.data.order import Source, sample_ids

    sources = [Source("a", 10**9, 0.7), Source("b", 10**7, 0.2), Source("c", 12_345, 0.1)]
    times = []
    for number in range(max(args.repeats, 3)):
        start = time.process_time()
        sample_ids(sources, 1, np.arange(number * 10**6, (number + 1) * 10**6))
        times.append(time.process_time() - start)
    return {"cpu_seconds_for_a_million": round(median(times), 3)}
