"""Is a resumed run the run that stopped? Saved on one layout, gone on with on another, against the undisturbed run."""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError

from ..layouts.layouts import MODELS, STEPS, Layout, configure, write_tokens

HELP = "save on one layout, resume on another: largest difference of losses and state from the undisturbed run"

HALF = STEPS // 2
# relative, of losses: what sums in another order make of fp32 within the steps after the resume
TOLERANCE = 1e-6

LAYOUTS = {
    "one rank": Layout(),
    "data 2": Layout(data=2),
    "data 2 zero 1": Layout(data=2, zero_stage=1),
    "data 4 zero 2": Layout(data=4, zero_stage=2),
    "tensor 2 sequence": Layout(tensor=2, sequence=True, recompute="selective"),
    "pipeline 2 1f1b": Layout(pipeline=2),
    "pipeline 2 interleaved": Layout(pipeline=2, schedule="interleaved", zero_stage=1),
    "pipeline 2 zb-v": Layout(pipeline=2, schedule="zb-v"),
    "context 2 zero 1": Layout(context=2, zero_stage=1),
    "tensor 2 pipeline 2": Layout(tensor=2, pipeline=2, sequence=True, schedule="zb-h1"),
    "data 2 tensor 2 zero 2": Layout(data=2, tensor=2, zero_stage=2),
    "data 2 pipeline 2 zero 2": Layout(data=2, pipeline=2, zero_stage=2, schedule="dualpipe-v"),
}
# Each layout is saved from and loaded on; changes of every axis, schedule and ZeRO stage, mixed.
PAIRS = [
    ("one rank", "one rank"),
    ("data 2 zero 1", "data 2 zero 1"),
    ("pipeline 2 zb-v", "pipeline 2 zb-v"),
    ("data 4 zero 2", "data 4 zero 2"),
    ("tensor 2 pipeline 2", "tensor 2 pipeline 2"),
    ("data 2 pipeline 2 zero 2", "data 2 pipeline 2 zero 2"),
    ("one rank", "data 4 zero 2"),
    ("one rank", "tensor 2 pipeline 2"),
    ("data 2", "tensor 2 sequence"),
    ("data 2", "pipeline 2 interleaved"),
    ("data 2 zero 1", "one rank"),
    ("one rank", "pipeline 2 interleaved"),
    ("tensor 2 sequence", "data 2 zero 1"),
    ("pipeline 2 zb-v", "tensor 2 sequence"),
    ("pipeline 2 1f1b", "context 2 zero 1"),
    ("context 2 zero 1", "pipeline 2 1f1b"),
    ("data 2 zero 1", "data 4 zero 2"),
    ("data 4 zero 2", "data 2 zero 1"),
    ("data 4 zero 2", "data 2 tensor 2 zero 2"),
    ("tensor 2 sequence", "context 2 zero 1"),
    ("tensor 2 sequence", "pipeline 2 zb-v"),
    ("pipeline 2 1f1b", "pipeline 2 interleaved"),
    ("pipeline 2 interleaved", "pipeline 2 zb-v"),
    ("pipeline 2 zb-v", "data 2 pipeline 2 zero 2"),
    ("context 2 zero 1", "data 2"),
    ("tensor 2 pipeline 2", "data 4 zero 2"),
    ("data 2 tensor 2 zero 2", "pipeline 2 1f1b"),
    ("data 2 pipeline 2 zero 2", "tensor 2 pipeline 2"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="llama,gpt2,mpt", help=f"comma-separated, of: {', '.join(MODELS)}")
    parser.add_argument(
        "--largest-world", type=int, default=4, help="only layouts of at most so many ranks (default 4)"
    )
    parser.add_argument("--pairs", type=int, help="only so many pairs of each model (default: all)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file, after each pair")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 only if same layouts are bitwise the same and all others within the tolerance.

    An interrupted run prints the pairs that it has done, and ends with 130.
    """
    models = args.models.split(",")
    if unknown := [m for m in models if m not in MODELS]:
        raise ConfigError(f"--models {args.models}: {unknown[0]} is not one of {', '.join(MODELS)}.")
    pairs = [p for p in PAIRS if max(LAYOUTS[name].world_size for name in p) <= args.largest_world][: args.pairs]
    rows: list[dict[str, Any]] = []
    interrupted = False
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="bench-resume-", dir=memory) as folder:
        try:
            for model in models:
                for row in measure(model, Path(folder) / model, pairs):
                    rows.append(row)
                    if args.out:
                        args.out.write_text(json.dumps(_result(rows), indent=2) + "\n", encoding="utf-8")
                    if sys.stderr.isatty():
                        print(f"\r{len(rows)} of {len(models) * len(pairs)} pairs", end="", file=sys.stderr)
        except KeyboardInterrupt:
            interrupted = True
    if not rows:
        return 130
    result = _result(rows)
    good = result["good"] == len(rows)
    status = 130 if interrupted else 0 if good else 1
    if args.json:
        print(json.dumps(result))
        return status
    print(f"{'model':<7}{'saved on':<26}{'resumed on':<26}{'losses':>10}{'weights':>10}{'moments':>10}")
    for row in rows:
        cells = [_cell(row[key]) for key in ("loss_difference", "weight_difference", "moment_difference")]
        mark = "" if row["good"] else "  TOO LARGE"
        print(f"{row['model']:<7}{row['saved']:<26}{row['resumed']:<26}{''.join(c.rjust(10) for c in cells)}{mark}")
    print(
        f"{result['good']} of {len(rows)} pairs good: the same layout bitwise, others within {TOLERANCE} of the losses"
        + (f"; interrupted before {len(models) * len(pairs) - len(rows)} more" if interrupted else "")
    )
    return status


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "steps": STEPS,
        "saved_at_step": HALF,
        "tolerance": TOLERANCE,
        "pairs": len(rows),
        "good": sum(row["good"] for row in rows),
        "largest_loss_difference": max(row["loss_difference"] for row in rows),
        "rows": rows,
    }


def measure(model: str, folder: Path, pairs: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """One row for each pair: relative differences from the undisturbed run of the layout that it is resumed on."""
    from .._workers import run_world

    folder.mkdir(parents=True)
    tokens = write_tokens(folder)

    def train(name: str, path: Path, every: int) -> list[float]:
        """Run on a layout from the newest checkpoint in `path` to the end; rank 0's losses."""
        found: list[list[float]] = []
        config = configure(model, LAYOUTS[name], tokens)
        config.checkpoint.path, config.checkpoint.every, config.checkpoint.keep = str(path), every, 0
        run_world(LAYOUTS[name].world_size, _body, config, str(path), receive=lambda values: found.append(values[0]))
        return found[0]

    whole: dict[str, list[float]] = {}
    for saved, resumed in pairs:
        for name in (saved, resumed):
            if name not in whole:
                whole[name] = train(name, folder / f"whole {name}", HALF)
        path = folder / f"{saved} to {resumed}"
        half = f"step-{HALF:08d}"
        shutil.copytree(folder / f"whole {saved}" / half, path / half)
        losses = train(resumed, path, 0)
        weights, moments = _state_difference(path, folder / f"whole {resumed}")
        expected = whole[resumed][HALF:]
        difference = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        same = saved == resumed
        shutil.rmtree(path)
        yield {
            "model": model,
            "saved": saved,
            "resumed": resumed,
            "layouts": [asdict(LAYOUTS[saved]), asdict(LAYOUTS[resumed])],
            "loss_difference": difference,
            "weight_difference": weights,
            "moment_difference": moments,
            "good": difference == weights == moments == 0.0 if same else difference <= TOLERANCE,
        }


def _body(config: Any, folder: str) -> Iterator[list[float]]:
    from megalm.parallel.mesh import Mesh, build_mesh
    from megalm.train.hooks import Hook
    from megalm.train.parts import build_trainer

    class Watch(Hook):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_step_end(self, trainer, record):
            self.losses.append(record["loss"])

    mesh = build_mesh(config.parallel) if config.world_size > 1 else Mesh.single()
    logs = Path(folder).with_suffix(f".rank-{mesh.rank}")
    logs.mkdir(exist_ok=True)
    trainer = build_trainer(config, mesh, logs)
    watch = Watch()
    trainer.hooks.append(watch)
    trainer.train()
    yield watch.losses


def _state_difference(path: Path, other: Path) -> tuple[float, float]:
    """(weights, optimizer moments) of the newest checkpoints: norm of the difference over the norm."""
    from megalm.checkpoint.reader import CheckpointReader

    first, second = CheckpointReader(path), CheckpointReader(other)
    sums = {False: [0.0, 0.0], True: [0.0, 0.0]}
    for name, expected in second.tensors(optimizer=True):
        pair = sums[name.startswith("optimizer.")]
        pair[0] += float((first.tensor(name).double() - expected.double()).square().sum())
        pair[1] += float(expected.double().square().sum())
    return tuple((top / bottom) ** 0.5 if top else 0.0 for top, bottom in (sums[False], sums[True]))  # type: ignore[return-value]


def _cell(value: float) -> str:
    return "bitwise" if value == 0.0 else f"{value:.1e}"
