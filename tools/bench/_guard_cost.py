"""What the guard costs where nothing happens, and how long a return from memory takes."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny, 4 x 256 tokens": ["train.global_batch_size=4", "train.micro_batch_size=4", "model.seq_length=256"],
    "tiny, 32 x 256 tokens": ["train.global_batch_size=32", "train.micro_batch_size=8", "model.seq_length=256"],
}
"""The first has one micro-batch a step: there what is done once a step weighs most."""
_TINY = ["model.hidden_size=256", "model.ffn_hidden_size=688", "guard.provoke.kind=none", "train.eval_every=0"]


def costs(data: str, steps: int = 64) -> list[dict[str, Any]]:
    """Step time with the guard and without, alternating step by step in one process."""
    return [
        _cost(name, data, max(16, steps // (1 + 3 * index)), more) for index, (name, more) in enumerate(SHAPES.items())
    ]


def _cost(name: str, data: str, steps: int, more: list[str]) -> dict[str, Any]:
    import torch

    from tools.bench._guard_recipes import make_trainer

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    folder = Path(tempfile.mkdtemp(prefix="megalm-guard-"))
    try:
        pairs = {
            choice: make_trainer(folder / choice, "bad_shard", data, f"guard={choice}", *_TINY, *more)
            for choice in ("default", "off")
        }
        trainers = {choice: pair[0] for choice, pair in pairs.items()}
        for trainer in trainers.values():
            for hook in trainer.hooks:
                hook.on_train_start(trainer)
        guard = pairs["default"][1]
        rows = []
        for step in range(-4, steps):
            if step == 0:
                guard.spent = dict.fromkeys(guard.spent, 0.0)
            took = {}
            for choice in sorted(trainers, reverse=bool(step % 2)):
                trainer, before = trainers[choice], guard.spent["snapshots"]
                begun = time.perf_counter()
                record = trainer.train_step()
                for hook in trainer.hooks:
                    hook.on_step_end(trainer, record)
                took[choice] = time.perf_counter() - begun
                if choice == "default":
                    took[choice] -= guard.spent["snapshots"] - before
            if step >= 0:
                rows.append(took)
        back = _return(trainers["default"], guard)
        for trainer in trainers.values():
            trainer.loader.close()
            trainer.events.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        torch.set_num_threads(threads)
    off = statistics.median(row["off"] for row in rows)
    each_step = statistics.median(row["default"] - row["off"] for row in rows)
    snapshots = guard.spent["snapshots"] / steps
    return {
        "shape": name,
        "steps": steps,
        "step_s": off,
        "each_step_s": each_step,
        "snapshots_s_per_step": snapshots,
        "observe_s_per_step": guard.spent["observe"] / steps,
        "share": (each_step + snapshots) / off,
        "return_s": back,
    }


def _return(trainer: Any, guard: Any) -> float:
    """Seconds to bring back the youngest snapshot."""
    begun = time.perf_counter()
    snapshot = guard.ring.youngest()
    guard.ring.restore(snapshot, trainer.boxes())
    trainer.load_state_dict(snapshot.state)
    return time.perf_counter() - begun


def tables(rows: list[dict[str, Any]]) -> str:
    """The results for a person."""
    lines = [
        f"{'cost without an event':<24}{'step ms':>9}{'+ each step':>13}{'+ snapshots':>13}{'share':>8}{'return s':>10}"
    ]
    for row in rows:
        lines.append(
            f"{row['shape']:<24}{row['step_s'] * 1e3:>9.1f}{row['each_step_s'] * 1e3:>10.2f} ms"
            f"{row['snapshots_s_per_step'] * 1e3:>10.2f} ms{row['share']:>8.2%}{row['return_s']:>10.3f}"
        )
    return "\n".join(lines)
