"""Real runs damaged on purpose, over seeds: was the verdict right, what was done, and what is left of the damage.

For each seed one undisturbed twin is trained; each recipe goes on from the twin's checkpoint of step BRANCH (the guard's
statistics are in it) and is compared with the twin at the end.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from megalm.config.compose import compose_config
from megalm.config.errors import ConfigError
from megalm.config.groups import find_conf_dir
from megalm.journal import format_number, read_course, read_events
from megalm.launch.resolve import resolve

from .._workers import run_world

BRANCH = 290
"""Step from which the damaged runs leave the twin: early enough for snapshots of several ages before step 360."""

EXPECTED = {
    "bad_shard": "data",
    "permuted_tokens": "data",
    "repeated_token": "data",
    "zeroed_second_moment": "weights",
    "learning_rate_jump": "weights",
    "bit_flip": "hardware",
    "large_gradients": "data",
    "one_bad_batch": "data",
    "ten_bad_batches": "data",
}
"""Recipe of experiment=spike/ -> the cause that the guard must name."""

VARIANTS = {
    "one_bad_batch": ("bad_shard", ["guard.provoke.steps=1"]),
    "ten_bad_batches": ("bad_shard", ["guard.provoke.steps=10"]),
}
"""Batches that heal by themselves: nothing may be rolled back."""

LAYOUTS = {
    "one process": (1, []),
    "dp=2": (2, []),
    "tp=2": (2, ["parallel.tensor=2"]),
    "pp=2": (2, ["parallel.pipeline=2"]),
}
SAME = ("bad_shard", "zeroed_second_moment", "learning_rate_jump", "bit_flip")
"""Recipes that are repeated on every layout, to compare the decisions."""

Report = Callable[[dict[str, Any]], None]


def run_recipes(
    names: Sequence[str], seeds: int, data: str, *, jobs: int, layouts: bool, report: Report, attached: bool = False
) -> None:
    """Run the recipes; `report` gets the whole result so far after every run, so that an interruption loses nothing.

    attached: start each run as a user does, `python -m megalm.launch` with console, metrics, TensorBoard and report,
    instead of a trainer with the guard alone.
    Errors: ConfigError for an unknown recipe, or missing data.
    """
    for name in names:
        if name not in EXPECTED:
            raise ConfigError(f"--recipes {name}: there is no such recipe. Recipes: {', '.join(EXPECTED)}.")
    _config("bad_shard", data)
    folder = Path(tempfile.mkdtemp(prefix="megalm-guard-"))
    result: dict[str, Any] = {"provoked": [], "layouts": []}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    chosen = list(names) or list(EXPECTED)
    pool = ThreadPoolExecutor(jobs)
    twins: dict[int, dict[str, Any]] = {}
    running: dict[Future[list[dict[str, Any]]], tuple[str, int, str]] = {}

    def start(name: str, seed: int, layout: str = "") -> None:
        size, more = LAYOUTS[layout or "one process"]
        if layout:  # two data ranks, or two stages, need two micro-batches
            more = [*more, "train.micro_batch_size=2"]
        run = folder / f"{name}-{seed}-{layout.replace(' ', '-')}"
        args = (str(run), name, data, seed, str(folder / f"twin-{seed}-"), size, threads, more)
        body: Callable[..., list[dict[str, Any]]] = _launch if attached else _run
        running[pool.submit(body, *args)] = (name, seed, layout)

    try:
        for seed in range(1, seeds + 1):
            start("twin", seed)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, seed, layout = running.pop(future)
                outcome = future.result()
                if name == "twin":
                    twins[seed] = outcome[0]
                    for each in chosen:
                        start(each, seed)
                    for each in [each for each in SAME if layouts and seed == 1 and each in chosen]:
                        for where in LAYOUTS:
                            start(each, seed, where)
                elif layout:
                    result["layouts"].append({"recipe": name, "layout": layout, "decisions": _decisions(outcome)})
                else:
                    result["provoked"].append(_row(name, seed, outcome[0], twins[seed]))
                report(result)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # else the command would only end with the runs under way
            process.terminate()
        for started in list(_launched):
            started.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: str, name: str, data: str, seed: int, twin: str, size: int, threads: int, more: list[str]) -> list:
    collected: list[list[dict[str, Any]]] = []
    run_world(size, _train, folder, name, data, seed, twin, size, threads, more, receive=collected.append, minutes=30)
    return collected[0]


def _train(
    folder: str, name: str, data: str, seed: int, twin: str, size: int, threads: int, more: list[str]
) -> Iterator[dict[str, Any]]:
    """One rank of one run: how it ended, and its events."""
    import torch

    torch.set_num_threads(threads)
    where = Path(folder)
    recipe, variant = _variant(name)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _branch(name, where, Path(twin))
    if size > 1:
        torch.distributed.barrier()
    trainer, _ = make_trainer(where, recipe, data, f"train.seed={seed}", *variant, *more, size=size)
    status = trainer.train()
    loss = trainer.evaluate().get("eval/loss", float("nan"))
    events = read_events(where / "events.jsonl")
    if name != "twin":
        shutil.rmtree(where / "checkpoints", ignore_errors=True)
    yield {"status": status, "loss": loss, "events": events}


def _variant(name: str) -> tuple[str, list[str]]:
    """The recipe's file, and what makes it another: the twin is a run that nothing happens to."""
    if name == "twin":
        return "bad_shard", ["guard.provoke.kind=none", f"checkpoint.every={BRANCH}", "checkpoint.keep=2"]
    return VARIANTS.get(name, (name, []))


def _branch(name: str, where: Path, twin: Path) -> None:
    """A damaged run goes on from a checkpoint of its twin."""
    if name != "twin":
        start = f"step-{BRANCH:08d}"
        shutil.copytree(twin / "checkpoints" / start, where / "checkpoints" / start)


_launched: list[subprocess.Popen] = []
"""Runs under way that are processes of their own."""


def _launch(
    folder: str, name: str, data: str, seed: int, twin: str, size: int, threads: int, more: list[str]
) -> list[dict[str, Any]]:
    """One run as a user starts it: how it ended, and its events."""
    where = Path(folder)
    recipe, variant = _variant(name)
    _branch(name, where, Path(twin))
    words = [*_words(recipe, data), f"train.seed={seed}", *variant, *more]
    words += [f"world_size={size}", f"run.dir={where.parent}", f"run.name={where.name}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megalm.launch", *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    _launched.append(process)
    try:
        said, _ = process.communicate()
    finally:
        _launched.remove(process)
    steps = read_course(where / "metrics.jsonl").steps
    outcome: dict[str, Any] = {
        "status": process.returncode,
        "loss": steps[-1].get("eval/loss", math.nan) if steps else math.nan,
        "events": read_events(where / "events.jsonl"),
        "said": said.strip().splitlines()[-8:] if process.returncode not in (0, 3) else [],
    }
    if name != "twin":
        shutil.rmtree(where, ignore_errors=True)
    elif process.returncode:
        raise ConfigError(
            f"the undisturbed run of seed {seed} ended with {process.returncode}: {' '.join(outcome['said'])}"
        )
    return [outcome]


def _words(recipe: str, data: str) -> list[str]:
    """Overrides of a recipe's run.

    Errors: ConfigError where the recipe or the data is not there.
    """
    if not (find_conf_dir() / "experiment" / "spike" / f"{recipe}.yaml").is_file():
        raise ConfigError(f"conf/experiment/spike/{recipe}.yaml is not there.")
    prefix = data if Path(f"{data}.bin").is_file() else f"{data}_text_document"
    if not Path(f"{prefix}.bin").is_file():
        raise ConfigError(
            f"--data {data}: there is no {data}.bin. Make it with `make data`, or name other tokenized data."
        )
    words = ["+model=tiny", f"+experiment=spike/{recipe}", f"data.train=[{prefix}]", "data.tokenizer=null"]
    return [*words, "device=cpu", "checkpoint.every=0", "train.eval_every=0"]


def _config(recipe: str, data: str, *more: str, size: int = 1) -> Any:
    config = compose_config([*_words(recipe, data), *more])
    resolve(config, size)
    return config


def make_trainer(folder: Path, recipe: str, data: str, *more: str, size: int = 1) -> tuple[Any, Any]:
    """Make a trainer of this recipe with the guard as its only hook."""
    from megalm.data.loader import Loader
    from megalm.guard.hook import GuardHook
    from megalm.parallel.mesh import build_mesh
    from megalm.resilience.chaos.provoke import make_provoke_hooks, provoke_source
    from megalm.train.parts import build_trainer

    config = _config(recipe, data, *more, size=size)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = build_mesh(config.parallel, "cpu")
    source = provoke_source(config, Loader(config, mesh.data), mesh)
    trainer = build_trainer(config, mesh, folder, batch_source=source, peak_flops=1.0)
    guard = GuardHook(config.guard)
    trainer.hooks += [guard, *make_provoke_hooks(config.guard)]
    return trainer, guard


def _row(name: str, seed: int, run: dict[str, Any], twin: dict[str, Any]) -> dict[str, Any]:
    events = run["events"]
    verdicts = [e["cause"] for e in events if e["kind"] == "verdict"]
    spikes = [e["cause"] for e in events if e["kind"] == "spike"]
    found = verdicts[-1] if verdicts else spikes[-1] if spikes else "none"
    seen = [e["step"] for e in events if e["kind"] == "spike"]
    struck = [e["step"] for e in events if e["kind"] == "provoke"]
    counts = {kind: sum(e["kind"] == kind for e in events) for kind in ("skip", "rollback", "replay")}
    return {
        "recipe": name,
        "seed": seed,
        "expected": EXPECTED[name],
        "verdict": found,
        "right": found == EXPECTED[name],
        "delay": min(seen) - min(struck) if seen and struck else None,
        "refused": counts["skip"],
        "rollbacks": counts["rollback"],
        "replays": counts["replay"],
        "rollback_s": max((e["seconds"] for e in events if e["kind"] == "recovered"), default=None),
        "loss": run["loss"],
        "regret": run["loss"] - twin["loss"],
        "status": run["status"],
        "said": run.get("said", []),
        "events": [
            _short(e) for e in events if e["kind"] in ("spike", "skip", "replay", "verdict", "rollback", "give_up")
        ],
    }


_KEPT = (
    *("kind", "step", "onset", "seen", "why", "cause", "loss", "expected", "z", "grad_z", "probe_excess", "to_step"),
    *("samples", "ranks", "action", "source"),
)


def _short(event: dict[str, Any]) -> dict[str, Any]:
    return {key: event[key] for key in _KEPT if key in event}


def _decisions(ranks: Sequence[dict[str, Any]]) -> list[list[Any]]:
    events = ranks[0]["events"]
    kept = [e for e in events if e["kind"] in ("spike", "skip", "replay", "rollback", "verdict")]
    return [[e["kind"], e["step"], e["onset"], e["cause"], e.get("samples"), e.get("to_step")] for e in kept]


def write_recipe_tables(result: dict[str, Any]) -> str:
    """The results for a person."""
    lines = [
        f"{'recipe':<22}{'seed':>5}{'verdict':>10}{'right':>7}{'delay':>7}{'refused':>9}{'rollbacks':>11}"
        f"{'back s':>8}{'regret':>9}"
    ]
    rows = sorted(result["provoked"], key=lambda row: (list(EXPECTED).index(row["recipe"]), row["seed"]))
    for row in rows:
        seconds = format_number(row["rollback_s"], ".3f")
        delay = "-" if row["delay"] is None else row["delay"]
        lines.append(
            f"{row['recipe']:<22}{row['seed']:>5}{row['verdict']:>10}{'yes' if row['right'] else 'NO':>7}{delay!s:>7}"
            f"{row['refused']:>9}{row['rollbacks']:>11}{seconds:>8}{format_number(row['regret'], '+.4f'):>9}"
        )
        if row.get("said"):
            lines += [f"    it ended with status {row['status']}:", *(f"    {line}" for line in row["said"])]
    if rows:
        right = sum(row["right"] for row in rows)
        near = sum(row["regret"] <= 0.02 for row in rows)
        slowest = max((row["rollback_s"] for row in rows if row["rollback_s"] is not None), default=0.0)
        worst = max((row["regret"] for row in rows), key=lambda regret: math.inf if math.isnan(regret) else regret)
        needless = sum(row["rollbacks"] for row in rows if row["recipe"] in VARIANTS)
        lines += [
            f"right verdicts: {right} of {len(rows)} ({right / len(rows):.0%}); within 0.02 nats of the twin: {near} of "
            f"{len(rows)}, worst {format_number(worst, '+.4f')}",
            f"rolled back where 1 or 10 bad batches heal by themselves: {needless} times; slowest return {slowest:.3f} s",
        ]
    for name in dict.fromkeys(row["recipe"] for row in result["layouts"]):
        found = {row["layout"]: row["decisions"] for row in result["layouts"] if row["recipe"] == name}
        alike = all(found[layout] == found.get("one process") for layout in found)
        lines.append(f"{name}: decisions on {', '.join(found)}: {'identical' if alike else 'DIFFERENT'}")
    return "\n".join(lines)
