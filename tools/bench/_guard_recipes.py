"""Real runs damaged on purpose, over seeds: was the verdict right, what was done, and what is left of the damage."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megalm.config.compose import compose_config, conf_dir
from megalm.config.errors import ConfigError
from megalm.config.resolve import resolve

EXPECTED = {
    "bad_shard": "data",
    "permuted_tokens": "data",
    "repeated_token": "data",
    "zeroed_second_moment": "weights",
    "learning_rate_jump": "weights",
    "bit_flip": "hardware",
    "large_gradients": "data",
}
"""Recipe of experiment=spike/ -> the cause that the guard must name."""

BAD_BATCHES = {"one_bad_batch": 1, "ten_bad_batches": 10}
"""Variants of bad_shard that heal by themselves: nothing may be rolled back."""


def recipes(names: list[str], seeds: int, data: str) -> list[dict[str, Any]]:
    """Run the recipes and their undisturbed twins. Errors: ConfigError for an unknown recipe, or missing data."""
    known = {**EXPECTED, **dict.fromkeys(BAD_BATCHES, "data")}
    for name in names:
        if name not in known:
            raise ConfigError(f"--recipes {name}: there is no such recipe. Recipes: {', '.join(known)}.")
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="megalm-guard-"))
    try:
        for seed in range(1, seeds + 1):
            twin = _train(folder, "twin", "bad_shard", seed, data, "guard.provoke.kind=none")
            for name in names or known:
                steps = BAD_BATCHES.get(name)
                recipe, more = (name, []) if steps is None else ("bad_shard", [f"guard.provoke.steps={steps}"])
                run = _train(folder, name, recipe, seed, data, *more)
                rows.append(_row(name, known[name], seed, run, twin))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _row(name: str, expected: str, seed: int, run: dict[str, Any], twin: dict[str, Any]) -> dict[str, Any]:
    verdicts = [e["cause"] for e in run["events"] if e["kind"] == "verdict"]
    spikes = [e["cause"] for e in run["events"] if e["kind"] == "spike"]
    found = verdicts[-1] if verdicts else spikes[-1] if spikes else "none"
    recovered = [e["seconds"] for e in run["events"] if e["kind"] == "recovered"]
    return {
        "recipe": name,
        "seed": seed,
        "expected": expected,
        "verdict": found,
        "right": found == expected,
        "refused": sum(e["kind"] == "skip" for e in run["events"]),
        "rollbacks": sum(e["kind"] == "rollback" for e in run["events"]),
        "replays": sum(e["kind"] == "replay" for e in run["events"]),
        "rollback_s": max(recovered, default=None),
        "loss": run["loss"],
        "regret": run["loss"] - twin["loss"],
        "status": run["status"],
    }


def _train(folder: Path, name: str, recipe: str, seed: int, data: str, *more: str) -> dict[str, Any]:
    run = folder / f"{name}-{seed}"
    trainer, _ = _trainer(run, recipe, data, f"train.seed={seed}", *more)
    status = trainer.train()
    loss = trainer_loss(trainer)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return {"status": status, "loss": loss, "events": events}


def _trainer(folder: Path, recipe: str, data: str, *more: str) -> tuple[Any, Any]:
    from megalm.guard.hook import GuardHook
    from megalm.parallel.mesh import Mesh
    from megalm.trainer import Trainer

    if not (conf_dir() / "experiment" / "spike" / f"{recipe}.yaml").is_file():
        raise ConfigError(f"conf/experiment/spike/{recipe}.yaml is not there.")
    overrides = ["+model=tiny", f"+experiment=spike/{recipe}", f"data.train=[{data}]", "data.tokenizer=null"]
    config = compose_config([*overrides, "device=cpu", "checkpoint.every=0", *more])
    resolve(config, 1)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, Mesh.single(), folder, peak_flops=1.0)
    guard = GuardHook(config.guard)
    trainer.hooks.append(guard)
    return trainer, guard


def trainer_loss(trainer: Any) -> float:
    """Held-out loss of the run as it ended."""
    return trainer.evaluate().get("eval/loss", float("nan"))


def cost(data: str, steps: int = 64) -> dict[str, Any]:
    """Step time with the guard and without, alternating step by step in one process, and where the time goes."""
    folder = Path(tempfile.mkdtemp(prefix="megalm-guard-"))
    quiet = ["guard.provoke.kind=none", "train.eval_every=0"]
    try:
        trainers = {}
        for name, choice in (("on", "default"), ("off", "off")):
            trainers[name] = _trainer(folder / name, "bad_shard", data, f"guard={choice}", *quiet)[0]
            for hook in trainers[name].hooks:
                hook.on_train_start(trainers[name])
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for step in range(steps):
            for name in sorted(trainers, reverse=bool(step % 2)):
                begun = time.perf_counter()
                record = trainers[name].train_step()
                for hook in trainers[name].hooks:
                    hook.on_step_end(trainers[name], record)
                times[name].append(time.perf_counter() - begun)
        guard = trainers["on"].hooks[0]
        spent = dict(guard.spent)
        for trainer in trainers.values():
            trainer.loader.close()
            trainer.events.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    off = statistics.median(times["off"])
    return {
        "steps": steps,
        "step_s": {name: statistics.median(values) for name, values in times.items()},
        "guard_s_per_step": sum(spent.values()) / steps,
        "guard_share": sum(spent.values()) / steps / off,
        "spent_s": spent,
    }


def tables(result: dict[str, Any]) -> str:
    """The results for a person."""
    lines = []
    if "provoked" in result:
        rows = result["provoked"]
        lines.append(
            f"{'recipe':<22}{'seed':>5}{'verdict':>10}{'right':>7}{'refused':>9}{'rollbacks':>11}{'regret':>9}"
        )
        for row in rows:
            lines.append(
                f"{row['recipe']:<22}{row['seed']:>5}{row['verdict']:>10}{'yes' if row['right'] else 'NO':>7}"
                f"{row['refused']:>9}{row['rollbacks']:>11}{row['regret']:>9.4f}"
            )
        right = sum(row["right"] for row in rows)
        worst = max((row["regret"] for row in rows), default=0.0)
        slowest = max((row["rollback_s"] for row in rows if row["rollback_s"] is not None), default=0.0)
        lines.append(
            f"right verdicts: {right} of {len(rows)}; worst regret {worst:+.4f}; slowest return {slowest:.3f} s"
        )
    if "cost" in result:
        found = result["cost"]
        lines.append(
            f"step {found['step_s']['off'] * 1e3:.1f} ms without, {found['step_s']['on'] * 1e3:.1f} ms with the guard; "
            f"the guard's own time is {found['guard_share']:.2%} of a step"
        )
        lines.append("  " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in found["spent_s"].items()))
    return "\n".join(lines)
