"""Starts small runs with faults in them, and reads from their events what was found, how soon, and what it cost.

One run sees one kind of fault in all phases, a phase an attempt: the first attempt is struck at its start, the second when
its ranks join, and so on to the last, whose ranks come to the end.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.tokens import TokenWriter
from megalm.journal import read_course, read_events

KINDS = ("kill", "stop", "exception", "exit", "out_of_memory", "hang")
PHASES = ("start", "join", "load", "data", "forward", "backward", "reduce", "update", "save", "evaluate", "end")
STEPS = 110
TIMEOUT_MINUTES = 0.25
"""Of collectives, and so the limit of phases that were not seen often enough to have one of their own."""


def tabulate_faults(kinds: Sequence[str]) -> dict[str, Any]:
    """Strike each phase with each kind. Returns rows of kind, phase, detect_s, recover_s, lost_steps, recovered, same_losses."""
    with tempfile.TemporaryDirectory(prefix="megalm-resilience-") as name:
        folder = Path(name)
        _train(folder, "calm")
        calm = _losses(folder / "calm")
        rows = []
        for kind in kinds:
            faults = ", ".join(
                f"{{kind: {kind}, phase: {phase}, step: {10 * place - 18 if place > 2 else 1}, rank: {place % 2}, "
                f"attempts: {place + 1}}}"
                for place, phase in enumerate(PHASES)
            )
            _train(folder, kind, f"resilience.chaos.faults=[{faults}]")
            rows += _read_rows(kind, folder / kind, _losses(folder / kind) == calm)
    return {"steps": STEPS, "ranks": 2, "timeout_minutes": TIMEOUT_MINUTES, "faults": rows}


def _read_rows(kind: str, folder: Path, same: bool) -> list[dict[str, Any]]:
    events = read_events(folder / "events.jsonl")
    losses = [event for event in events if event["kind"] in ("rank_lost", "hang")]
    restarts = {event["attempt"]: event for event in events if event["kind"] == "restart"}
    rows = []
    for place, phase in enumerate(PHASES):
        seen = place < len(losses)
        restart = restarts.get(place + 1)
        rows.append(
            {
                "kind": kind,
                "phase": phase,
                "named": seen and losses[place]["rank"] == place % 2,
                "detect_s": restart["phases"]["detect"] if restart else None,
                "recover_s": round(restart["seconds"] - restart["phases"]["wait"], 3) if restart else None,
                "lost_steps": restart["lost_steps"] if restart else None,
                "recovered": seen,
                "same_losses": same,
            }
        )
    return rows


def walk_worlds() -> dict[str, Any]:
    """Have one run lose its places and get them back, 4 -> 3 -> 1 -> 2 -> 4 ranks; compare its losses with one rank's."""
    lost = (
        "{kind: lose, step: 25, rank: 3, until: 220}",
        "{kind: lose, step: 45, rank: 1, until: 60}",
        "{kind: lose, step: 45, rank: 2, until: 220}",
    )
    words = ("train.steps=400", "world_size=4", "resilience.min_ranks=1")
    with tempfile.TemporaryDirectory(prefix="megalm-resilience-") as name:
        folder = Path(name)
        _train(folder, "one", "train.steps=400", "world_size=1")
        _train(folder, "worlds", *words, f"resilience.chaos.faults=[{', '.join(lost)}]")
        one, worlds = _losses(folder / "one"), _losses(folder / "worlds")
        restarts = [event for event in read_events(folder / "worlds/events.jsonl") if event["kind"] == "restart"]
    rows = [
        {
            "world_size": event["world_size"],
            "excluded": event["excluded"],
            "step": event["step"],
            "lost_steps": event["lost_steps"],
            "seconds": event["seconds"],
        }
        for event in restarts
    ]
    return {
        "steps": len(worlds),
        "worlds": [4, *(row["world_size"] for row in rows)],
        "restarts": rows,
        "each_step_once": one.keys() == worlds.keys(),
        "largest_difference": max(abs(worlds[step] - loss) for step, loss in one.items()),
    }


def soak(seconds: float, mean_s: float) -> dict[str, Any]:
    """Train for so long with a fault by chance every `mean_s`; what share of the time went into steps that were kept."""
    with tempfile.TemporaryDirectory(prefix="megalm-resilience-") as name:
        folder = Path(name)
        struck = (("kill", "backward"), ("exit", "data"), ("exception", "reduce"), ("kill", "save"))
        faults = ", ".join(f"{{kind: {kind}, phase: {phase}}}" for kind, phase in struck)
        process = subprocess.Popen(
            _command(folder, "soak", "train.steps=10000000", "train.eval_every=200", "checkpoint.every=50",
                     f"resilience.chaos.faults=[{faults}]", f"resilience.chaos.mean_s={mean_s}"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        begun = time.monotonic()
        while time.monotonic() < begun + seconds and process.poll() is None:
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        events = read_events(folder / "soak/events.jsonl")
        kept = read_course(folder / "soak/metrics.jsonl").steps
    restarts = [event for event in events if event["kind"] == "restart"]
    took = max(event["time"] for event in events) - min(event["time"] for event in events)
    step_s = statistics.median(row["step_time_s"] for row in kept)
    badput = (
        {name: sum(event["phases"][name] for event in restarts) for name in restarts[0]["phases"]} if restarts else {}
    )
    badput["redo"] = step_s * sum(event["lost_steps"] for event in restarts)
    return {
        "seconds": round(took, 1), "mean_s": mean_s, "restarts": len(restarts), "steps": len(kept),
        "step_s": round(step_s, 5), "goodput": round(1 - sum(badput.values()) / took, 4),
        "badput_s": {name: round(lost, 2) for name, lost in badput.items()},
        "given_up": sum(event["kind"] == "give_up" for event in events),
    }  # fmt: skip


def _train(folder: Path, name: str, *words: str) -> None:
    """Train to the end. Errors: RuntimeError with what the run said, where it does not come there."""
    command = _command(folder, name, f"train.steps={STEPS}", "train.eval_every=20", "checkpoint.every=10", *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: the run ended with status {done.returncode}\n{done.stderr[-4000:]}")


def _command(folder: Path, name: str, *words: str) -> list[str]:
    return [
        sys.executable, "-m", "megalm.launch", "+model=tiny", "model.num_layers=2", "model.hidden_size=64",
        "model.ffn_hidden_size=128", "model.vocab_size=512", "model.seq_length=64", "train.global_batch_size=12",
        "train.micro_batch_size=1", "train.eval_sequences=4", "train.sample=false", "optim.warmup_steps=10", "device=cpu",
        "world_size=2", "data.tokenizer=null", f"data.train=[{_write_corpus(folder)}]", f"run.dir={folder}", f"run.name={name}",
        "resilience.max_restarts=20", f"resilience.timeout_minutes={TIMEOUT_MINUTES}", *words,
    ]  # fmt: skip


def _write_corpus(folder: Path) -> str:
    """Documents of noisy counting."""
    prefix, draw = folder / "numbers_text_document", np.random.RandomState(7)
    if not prefix.with_suffix(".idx").exists():
        with TokenWriter(prefix, np.uint16) as writer:
            for _ in range(400):
                counted = np.arange(300) + draw.randint(512)
                noise = draw.randint(0, 512, 300) * (draw.rand(300) < 0.1)
                writer.add_document(((counted + noise) % 512).astype(np.uint16))
    return str(prefix)


def _losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_course(folder / "metrics.jsonl").steps}
