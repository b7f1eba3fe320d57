"""Does the layout change the answer? Tiny models trained on every layout, against one process."""

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from megalm.config.errors import ConfigError

from ._layout import Layout, fold_experts, list_layouts
from ._models import COMMON, GLOBAL_BATCH, MODELS, SEQ_LENGTH, STEPS

HELP = "train tiny models on every layout: largest difference of loss and weights from one process, tokens/s"

# relative; sums in another order differ in the last of fp32's 24 bits, and ten steps carry that on
TOLERANCE = 1e-5


def write_tokens(folder: Path, vocab_size: int = 96) -> str:
    """A small corpus of noisy counting, for something to learn; returns its prefix."""
    import numpy as np

    from megalm.data.tokens import TokenWriter

    prefix = folder / "tokens"
    random = np.random.RandomState(11)
    with TokenWriter(prefix, np.uint16) as writer:
        for _ in range(60):
            counted = np.arange(120) + random.randint(vocab_size)
            noise = random.randint(0, vocab_size, counted.size) * (random.rand(counted.size) < 0.2)
            writer.add_document(((counted + noise) % vocab_size).astype(np.uint16))
    return str(prefix)


def configure(model: str, layout: Layout, tokens: str) -> Any:
    """The resolved configuration of one run."""
    from megalm.config.compose import compose_config
    from megalm.launch.resolve import resolve

    config = compose_config([*COMMON, *MODELS[model], *layout.overrides(), f"data.train=[{tokens}]"])
    resolve(config, layout.world_size)
    return config


def train(config: Any, folder: Path, mesh: Any = None) -> dict[str, Any]:
    """Train on this rank. Returns losses (and the evaluation's), gradient norms, seconds a step, and this rank's boxes."""
    from megalm.parallel.mesh import Mesh
    from megalm.train.parts import build_trainer

    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, mesh or Mesh.single(), folder)
    try:
        records, seconds = [], []
        for _ in range(STEPS):
            started = time.perf_counter()
            records.append(trainer.train_step())
            seconds.append(time.perf_counter() - started)
        boxes = [
            (box.name, tuple(box.offset), box.tensor.clone())
            for box in trainer.boxes()
            if not box.name.startswith("optimizer.")
        ]
    finally:
        trainer.checkpoints.close()
        trainer.batch_source.close()
        trainer.events.close()
    return {
        "losses": [record["loss"] for record in records] + [records[-1]["eval/loss"]],
        "grad_norms": [record["grad_norm"] for record in records],
        "seconds": median(seconds[2:]),
        "boxes": boxes,
    }


def compare(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """One rank's result beside the reference's, all of whose boxes are whole tensors."""
    whole = {name: tensor for name, _, tensor in reference["boxes"]}
    squares, worst, worst_name, elements, states = 0.0, -1.0, "", 0, 0.0
    for name, offset, tensor in result["boxes"]:
        expected = whole[name]
        part = expected[tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))]
        square = float((tensor - part).double().square().sum())
        squares += square
        elements += tensor.numel()
        if ".router." in name and not name.endswith((".weight", ".bias")):
            states += square  # integers decide over them: they must be the same bit by bit
        relative = square**0.5 / max(float(expected.double().norm()), 1e-3)
        if not relative <= worst:  # also for NaN
            worst, worst_name = relative, name
    return {
        "loss_difference": _largest(result["losses"], reference["losses"]),
        "grad_norm_difference": _largest(result["grad_norms"], reference["grad_norms"]),
        "weight_squares": squares,
        "state_squares": states,
        "reference_squares": sum(float(t.double().square().sum()) for t in whole.values()),
        "worst_tensor_difference": worst,
        "worst_tensor": worst_name,
        "seconds": result["seconds"],
        "elements": elements,
        "all_elements": sum(tensor.numel() for tensor in whole.values()),
    }


def _largest(values: list[float], expected: list[float]) -> float:
    differences = [abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True)]
    return float("nan") if any(d != d for d in differences) else max(differences)


def rank_body(jobs: list[tuple[str, Any]], folder: str, references: dict[str, str]) -> Iterator[dict[str, Any]]:
    """On each rank of one world: all jobs (model, configuration), of one mesh shape, on one mesh for each way to deal experts."""
    import torch

    from megalm.parallel.mesh import build_mesh

    first = jobs[0][1]
    meshes: dict[tuple[int, int], Any] = {}
    for _, config in jobs if first.world_size > 1 else []:
        experts = config.parallel.expert, config.parallel.expert_tensor
        if experts not in meshes:
            meshes[experts] = build_mesh(config.parallel)
    known = {model: torch.load(path) for model, path in references.items()}
    for number, (model, config) in enumerate(jobs):
        mesh = meshes.get((config.parallel.expert, config.parallel.expert_tensor))
        yield compare(train(config, Path(folder) / f"{first.world_size}-{number}", mesh), known[model])


def train_reference(config: Any, folder: str, path: str) -> Iterator[dict[str, Any]]:
    """One process, trained and stored."""
    import torch

    result = train(config, Path(folder))
    torch.save(result, path)
    yield {"seconds": result["seconds"], "losses": result["losses"]}


def merge(model: str, layout: Layout, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table from all ranks' comparisons.

    weight_difference: ||w - w'|| / ||w'|| over all weights; several ranks' copies of a weight count several times.
    """

    def most(name: str) -> float:
        return max((r[name] for r in ranks), key=lambda x: float("inf") if x != x else x)

    worst = max(ranks, key=lambda r: r["worst_tensor_difference"])
    weight = (sum(r["weight_squares"] for r in ranks) / ranks[0]["reference_squares"]) ** 0.5
    row = {
        "model": model,
        "layout": str(layout),
        "world_size": layout.world_size,
        **asdict(layout),
        "loss_difference": most("loss_difference"),
        "grad_norm_difference": most("grad_norm_difference"),
        "weight_difference": weight,
        "worst_tensor": worst["worst_tensor"],
        "worst_tensor_difference": worst["worst_tensor_difference"],
        "tokens_per_s": GLOBAL_BATCH * SEQ_LENGTH / most("seconds"),
    }
    # every element of every weight must have been compared, too
    complete = sum(r["elements"] for r in ranks) >= ranks[0]["all_elements"]
    row["states_equal"] = all(r["state_squares"] == 0 for r in ranks)
    close = row["loss_difference"] <= TOLERANCE and weight <= TOLERANCE
    row["equal"] = bool(complete and close and row["states_equal"])
    return row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every ZeRO stage and recomputation with every layout")
    parser.add_argument("--models", default="llama,gpt2,mpt", help=f"comma-separated, of: {', '.join(MODELS)}")
    parser.add_argument("--match", metavar="WORDS", help="only layouts whose line holds all these words: 'p2 zb-v'")
    parser.add_argument("--largest-world", type=int, default=8, help="at most so many ranks (default 8)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    models = args.models.split(",")
    if unknown := [m for m in models if m not in MODELS]:
        raise ConfigError(f"--models {args.models}: {unknown[0]} is not one of {', '.join(MODELS)}.")
    chosen = [
        layout
        for layout in list_layouts(args.full)
        if layout.world_size <= args.largest_world
        and all(word in str(layout).split() for word in (args.match or "").split())
    ]
    if not chosen:
        raise ConfigError(
            f"--match {args.match!r}: no layout has all these words; one looks like '{list_layouts()[-1]}'."
        )
    environment = describe_environment()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="megalm-layouts-") as name:
            _run(models, chosen, Path(name), rows, quiet=args.json)
    except KeyboardInterrupt:
        if not rows:
            raise
    failures = [row for row in rows if not row["equal"]]
    result = {
        "benchmark": "layouts",
        "steps": STEPS,
        "tolerance": TOLERANCE,
        "seconds": round(time.monotonic() - started, 1),
        "environment": environment | {"load_at_end": os.getloadavg()[0]},
        "largest_loss_difference": max((r["loss_difference"] for r in rows if "error" not in r), default=None),
        "largest_weight_difference": max((r["weight_difference"] for r in rows if "error" not in r), default=None),
        "runs": len(rows),
        "runs_asked_for": len(models) * len(chosen),
        "unequal": len(failures),
        "rows": rows,
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{len(rows)} of {result['runs_asked_for']} runs of {STEPS} steps in {result['seconds']:.0f} s")
        print(f"largest relative difference of a loss:  {result['largest_loss_difference']}")
        print(f"largest relative difference of weights: {result['largest_weight_difference']}")
        print(f"{len(failures)} beyond {TOLERANCE:g}")
    return 1 if failures else 0


def _run(models: list[str], chosen: list[Layout], folder: Path, rows: list[dict[str, Any]], quiet: bool) -> None:
    """Train all layouts of all models; adds to `rows` as they are done.

    Each layout once, with the models in turn; then each with another model, until all have met: a run that is
    interrupted has seen as many layouts as it could.
    """
    from .._workers import run_world

    tokens = write_tokens(folder)
    references = {model: str(folder / f"{model}.pt") for model in models}
    for model in models:
        config = configure(model, Layout(), tokens)
        run_world(1, train_reference, config, str(folder / model), references[model], receive=lambda _: None)
    if not quiet:
        print(f"{'model':<6} {'layout':<58} {'loss diff':>10} {'weight diff':>11} {'tokens/s':>9}")

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if quiet:
            return
        if "error" in row:
            print(f"{row['model']:<6} {row['layout']:<58} FAILED\n{row['error']}", flush=True)
            return
        print(
            f"{row['model']:<6} {row['layout']:<58} {row['loss_difference']:>10.1e} {row['weight_difference']:>11.1e} "
            f"{row['tokens_per_s']:>9.0f}" + ("" if row["equal"] else f"  DIFFERS, most in {row['worst_tensor']}"),
            flush=True,
        )

    shapes = sorted({layout.shape for layout in chosen}, key=lambda s: (s[0] * s[1] * s[2] * s[3], s))
    for turn, shape in itertools.product(range(len(models)), shapes):
        left = [
            (model := models[(number + turn) % len(models)], fold_experts(model, layout, number))
            for number, layout in enumerate(chosen)
            if layout.shape == shape
        ]
        while left:
            jobs = [(model, configure(model, layout, tokens)) for model, layout in left]
            place = str(folder / f"{turn}-{'-'.join(map(str, shape))}-{len(left)}")

            def receive(values: list[dict[str, Any]], left: list[tuple[str, Layout]] = left) -> None:
                add(merge(*left.pop(0), values))

            try:
                run_world(left[0][1].world_size, rank_body, jobs, place, references, receive=receive)
            except RuntimeError as error:  # the run that failed is a row like any other; the rest goes on
                model, layout = left.pop(0)
                named = {"model": model, "layout": str(layout), "world_size": layout.world_size, **asdict(layout)}
                add({**named, "equal": False, "error": str(error)})


def describe_environment() -> dict[str, Any]:
    import torch

    from megalm.ops.backend import find_library, get_backend

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": "reference" if find_library() is None or get_backend() == "reference" else "native",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
