"""What the guard costs where nothing happens, and how long a return from memory takes."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny, 4 x 256 tokens": ["train.global_batch_size=4", "train.micro_batch_size=4", "model.seq_length=256"],
    "tiny, 32 x 256 tokens": ["train.global_batch_size=32", "train.micro_batch_size=8", "model.seq_length=256"],
}
"""The first has one micro-batch a step: there what is done once a step weighs most."""
_TINY = ["model.hidden_size=256", "model.ffn_hidden_size=688", "guard.provoke.kind=none", "train.eval_every=0"]


def measure_costs(data: str, steps: int = 64) -> list[dict[str, Any]]:
    """Measure what the guard's parts take of a step, and step times with the guard and without, alternating in one process."""
    return [
        _cost(name, data, max(16, steps // (1 + 3 * index)), more) for index, (name, more) in enumerate(SHAPES.items())
    ]


class _Clock:
    """Seconds spent in functions that are wrapped."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


def _cost(name: str, data: str, steps: int, more: list[str]) -> dict[str, Any]:
    import torch

    from megalm import ops

    from ._recipes import make_trainer

    threads, plain = torch.get_num_threads(), ops.largest_logits_
    torch.set_num_threads(os.cpu_count() or 1)
    folder = Path(tempfile.mkdtemp(prefix="megalm-guard-"))
    clocks = {"logits": _Clock(), "updates": _Clock()}
    try:
        pairs = {
            choice: make_trainer(folder / choice, "bad_shard", data, f"guard={choice}", *_TINY, *more)
            for choice in ("default", "off")
        }
        trainers, guard = {choice: pair[0] for choice, pair in pairs.items()}, pairs["default"][1]
        measured = trainers["default"].measurement.updates
        ops.largest_logits_ = clocks["logits"].wrapped(plain)
        measured.sums = clocks["updates"].wrapped(measured.sums)
        for trainer in trainers.values():
            for hook in trainer.hooks:
                hook.on_train_start(trainer)
        rows = []
        for step in range(-4, steps):
            if step == 0:
                guard.spent = dict.fromkeys(guard.spent, 0.0)
                for clock in clocks.values():
                    clock.seconds = 0.0
            took = {choice: _step(trainers[choice]) for choice in sorted(trainers, reverse=bool(step % 2))}
            rows += [took] if step >= 0 else []
        back = _return(trainers["default"], guard)
        for trainer in trainers.values():
            trainer.batch_source.close()
            trainer.events.close()
    finally:
        ops.largest_logits_ = plain
        shutil.rmtree(folder, ignore_errors=True)
        torch.set_num_threads(threads)
    off = statistics.median(row["off"] for row in rows)
    differences = sorted(row["default"] - row["off"] for row in rows)
    spread = statistics.median(abs(d - statistics.median(differences)) for d in differences)
    parts = {**guard.spent, **{part: clock.seconds for part, clock in clocks.items()}}
    return {
        "shape": name,
        "steps": steps,
        "step_s": off,
        "parts_s_per_step": {part: seconds / steps for part, seconds in parts.items()},
        "share": sum(parts.values()) / steps / off,
        "paired_share": statistics.median(differences) / off,
        "paired_error": 1.2533 * 1.4826 * spread / len(differences) ** 0.5 / off,
        "return_s": back,
    }


def _step(trainer: Any) -> float:
    begun = time.perf_counter()
    record = trainer.train_step()
    for hook in trainer.hooks:
        hook.on_step_end(trainer, record)
    return time.perf_counter() - begun


def _return(trainer: Any, guard: Any) -> float:
    """Seconds to bring back the youngest snapshot."""
    begun = time.perf_counter()
    snapshot = guard.ring.youngest()
    guard.ring.restore(snapshot, trainer.boxes())
    trainer.restore(snapshot.state)
    return time.perf_counter() - begun


def write_cost_tables(rows: list[dict[str, Any]]) -> str:
    """The results for a person."""
    lines = [
        "cost without an event: the guard's parts timed one by one, and the difference of alternating steps",
        f"{'':<24}{'step ms':>9}{'share':>8}{'alternating':>18}{'return s':>10}",
    ]
    for row in rows:
        paired = f"{row['paired_share']:+.2%} +- {row['paired_error']:.2%}"
        lines.append(
            f"{row['shape']:<24}{row['step_s'] * 1e3:>9.1f}{row['share']:>8.2%}{paired:>18}{row['return_s']:>10.3f}"
        )
        parts = ", ".join(f"{part} {seconds * 1e3:.2f} ms" for part, seconds in row["parts_s_per_step"].items())
        lines.append(f"    a step: {parts}")
    return "\n".join(lines)
