"""A run's life from its journal: how far it is, how often it broke off, what that cost, and what share of its time was kept."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from megalm.journal.lines import Row
from megalm.journal.steps import choose_course


@dataclass
class Life:
    """What a run went through."""

    step: int
    """Last step made; 0: none."""
    loss: float | None
    step_s: float | None
    """Median of the steps that count."""
    durable: int | None
    """Step of the newest checkpoint that was told of."""
    starts: int
    """Times that somebody, or something, started it."""
    restarts: int
    """Times that its supervisor started the ranks again."""
    lost_steps: int
    """Made again after restarts."""
    badput_s: dict[str, float] = field(default_factory=dict)
    """Seconds of all restarts by what they went into: detect, stop, wait, start, join, load, redo."""
    trained_s: float = 0.0
    """In steps that count."""
    goodput: float | None = None
    """trained_s / (trained_s + badput); None where nothing was trained. Evaluations and saves belong to neither."""
    ended: str | None = None
    """How: `gave up`, `was stopped`; None: it trains, is done, or was killed with its supervisor."""


def tell_life(events: Sequence[Row], made: Sequence[Row]) -> Life:
    """Sum up a run. made: every line of metrics.jsonl."""
    steps = choose_course(made).steps
    times = [row["step_time_s"] for row in steps if row.get("step_time_s") is not None]
    step_s = statistics.median(times) if times else None
    restarts = [event for event in events if event["kind"] == "restart"]
    lost = sum(event.get("lost_steps", 0) for event in restarts)
    badput: dict[str, float] = {}
    for event in restarts:
        for name, seconds in event.get("phases", {}).items():
            badput[name] = badput.get(name, 0.0) + seconds
    if restarts:
        badput["redo"] = lost * (step_s or 0.0)
    trained, wasted = sum(times), sum(badput.values())
    last = next((event["kind"] for event in reversed(events) if event["kind"] in _ENDS), None)
    return Life(
        step=steps[-1]["step"] if steps else 0,
        loss=steps[-1].get("loss") if steps else None,
        step_s=step_s,
        durable=next((event["step"] for event in reversed(events) if event["kind"] == "checkpoint"), None),
        starts=max(1, sum(event["kind"] == "start" for event in events) - len(restarts)),
        restarts=len(restarts),
        lost_steps=lost,
        badput_s=badput,
        trained_s=trained,
        goodput=trained / (trained + wasted) if trained else None,
        ended=None if last is None else _ENDS[last],
    )


_ENDS = {"give_up": "gave up", "preempted": "was stopped", "start": None}
"""Events after which a run does not go on by itself; a later start does."""
