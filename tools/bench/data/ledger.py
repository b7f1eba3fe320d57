"""Every sample exactly once: ranks are killed and taken up again on other layouts, and what they read is counted."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HELP = "kill the loader's ranks, go on with other numbers of them, and count every sample that was trained on"
SEQ = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layouts", default="2,3,1", help="data ranks of each stretch; all but the last end by SIGKILL (%(default)s)"
    )
    parser.add_argument("--form", choices=["bin", "mds", "store"], default="bin", help="where samples come from")
    parser.add_argument("--packing", choices=["stream", "documents", "best_fit"], default="stream")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def make_sources(folder: Path, form: str) -> list[str]:
    """Three sources whose tokens are all different, so that a token says which sample it is of."""
    from megalm.data.formats.mds import write_token_documents
    from megalm.data.tokens import TokenWriter

    rng, start, prefixes = np.random.default_rng(0), 0, []
    for name, count in (("a", 900), ("b", 300), ("c", 100)):
        lengths = rng.integers(2, 60, count)
        pieces = np.split(np.arange(start, start + lengths.sum()), np.cumsum(lengths)[:-1])
        start += int(lengths.sum())
        place = folder / form / name
        if form == "bin" or form == "store":
            with TokenWriter(place, np.int32) as writer:
                for piece in pieces:
                    writer.add_document(piece)
        else:
            write_token_documents(pieces, place, np.dtype(np.int32), size_limit=20_000, hashes=["xxh64"])
        prefixes.append(f"file://{place}" if form == "store" else str(place))
    return prefixes


def make_loader(settings: dict[str, Any], rank: int, size: int) -> Any:
    """Make the loader of one rank: three sources, two phases of different mixtures and sequence lengths."""
    from types import SimpleNamespace

    from megalm.config import Config
    from megalm.config.phases import PhaseConfig
    from megalm.data.loader import Loader

    config = Config()
    config.data.train, config.data.holdout, config.data.prefetch = settings["prefixes"], 0.0, 2
    config.data.packing, config.data.cache = settings["packing"], settings["cache"]
    config.model.seq_length, config.model.vocab_size = SEQ, 1 << 30
    config.train.global_batch_size, config.train.micro_batch_size = 12, 2
    short = SEQ if settings["packing"] == "best_fit" else SEQ // 2
    config.data.phases = [
        PhaseConfig(name="one", steps=40, mixture={"a": 0.6, "b": 0.3, "c": 0.1}),
        PhaseConfig(name="two", steps=60, mixture={"a": 0.5, "b": 0.5}, seq_length=short),
    ]
    return Loader(config, SimpleNamespace(rank=rank, size=size))


def rank_main(settings_path: str, rank: int, size: int) -> None:
    """One rank: takes batches, writes down what it read; rank 0 saves the state when all have written it down."""
    settings = json.loads(Path(settings_path).read_text())
    loader = make_loader(settings, rank, size)
    state = Path(settings["state"])
    done = 0
    if state.exists():
        saved = json.loads(state.read_text())
        loader.load_state_dict(saved)
        done = saved["batches"]
    ledgers = [Path(settings["ledger"]) / f"{settings['stretch']}-{other}" for other in range(size)]
    with open(ledgers[rank], "a", buffering=1) as ledger:
        while done < settings["steps"]:
            rows = [row.tolist() for batch in loader.next() for row in batch.tokens]
            done += 1
            ledger.write(json.dumps({"batch": done, "rows": rows}) + "\n")
            if done % 5 == 0:  # a checkpoint: after every rank's part of the step, as in training
                while any(not p.exists() or p.read_text().count("\n") < done - settings["from"] for p in ledgers):
                    time.sleep(0.002)
                if rank == 0:
                    aside = state.with_suffix(".new")
                    aside.write_text(json.dumps(loader.state_dict()))
                    os.replace(aside, state)
                while not state.exists() or json.loads(state.read_text())["batches"] < done:
                    time.sleep(0.002)
            time.sleep(0.002)
    loader.close()


def run(args: argparse.Namespace) -> int:
    sizes = [int(word) for word in args.layouts.split(",")]
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="ledger-") as name:
        folder = Path(name)
        (folder / "ledger").mkdir()
        settings = {
            "prefixes": make_sources(folder, args.form), "packing": args.packing, "cache": str(folder / "cache"),
            "state": str(folder / "state.json"), "ledger": str(folder / "ledger"), "steps": 100,
        }  # fmt: skip
        alone = make_loader(settings, 0, 1)
        expected = [[row.tolist() for batch in alone.next() for row in batch.tokens] for _ in range(100)]
        alone.close()
        consumed: list[list[list[int]]] = []
        stretches = []
        for number, size in enumerate(sizes):
            begun = _batches(folder / "state.json")
            settings |= {"stretch": number, "from": begun}
            (folder / "settings.json").write_text(json.dumps(settings))
            code = (
                "import sys; from tools.bench.data.ledger import rank_main as r; "
                "r(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
            )
            ranks = [
                subprocess.Popen([sys.executable, "-c", code, str(folder / "settings.json"), str(rank), str(size)])
                for rank in range(size)
            ]
            last = number == len(sizes) - 1
            if not last:
                goal = begun + rng.randrange(12, 90 // len(sizes))
                while _written(folder / "ledger" / f"{number}-0") < goal - begun:
                    if any(process.poll() for process in ranks):
                        raise RuntimeError("a rank of the ledger failed")
                    time.sleep(0.005)
                for process in ranks:
                    process.send_signal(signal.SIGKILL)
            if [process.wait() for process in ranks] != [0 if last else -signal.SIGKILL] * size:
                raise RuntimeError("a rank of the ledger failed")
            saved = _batches(folder / "state.json")
            parts = [_rows(folder / "ledger" / f"{number}-{rank}", saved) for rank in range(size)]
            consumed += [[row for part in step for row in part] for step in zip(*parts, strict=True)]
            stretches.append({"ranks": size, "from_batch": begun, "to_batch": saved, "killed": not last})
    same = consumed == expected
    samples = [tuple(row) for step in consumed for row in step]
    result = {
        "form": args.form, "packing": args.packing, "stretches": stretches, "samples": len(samples),
        "distinct": len(set(samples)), "same_order_as_one_rank": same,
    }  # fmt: skip
    good = same and len(set(samples)) == len(samples) == 1200
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=None if args.json else 1))
    return 0 if good else 1


def _batches(state: Path) -> int:
    return int(json.loads(state.read_text())["batches"]) if state.exists() else 0


def _written(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _rows(path: Path, limit: int) -> list[list[list[int]]]:
    """Rows by batch, of the batches that the last saved state covers."""
    found = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record["rows"] for record in found if record["batch"] <= limit]
