"""Which samples a step of a run was made from, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.reader import CheckpointReader
from megalm.config import Config
from megalm.config.attempts import CONFIG, find_config_of_step
from megalm.config.errors import ConfigError
from megalm.config.saved import load_config
from megalm.data.loader import Loader
from megalm.data.openers import name_sources
from megalm.data.phases import Curriculum
from megalm.data.stream import advance, merge_ranges, take, take_back
from megalm.journal import read_events, read_steps
from megalm.parallel.mesh import Axis
from megalm.tokenizer.tokenizer import load_tokenizer

NEVER = 1 << 60
"""A step beyond any that was made: its settings are the newest."""


def find_samples_of_step(run: Path, step: int) -> list[dict[str, Any]]:
    """Find every sample of a step that was made: source, document, offset, position in the stream, and text.

    Errors: ConfigError if there is no such run or step, or its data is gone.
    """
    found = look_at_step(run, step)
    if not found["recorded"]:
        known = sorted({record["step"] for record in read_steps(run / "metrics.jsonl")})
        span = f"it holds steps {known[0]} to {known[-1]}" if known else "it is not there, or empty"
        raise ConfigError(f"step {step} is not in {run / 'metrics.jsonl'}: {span}.")
    return found["samples"]


def look_at_step(run: Path, step: int) -> dict[str, Any]:
    """Find the samples of a step's global batch with their places and texts; of a step that is not `recorded`, those that it
    will be made from if nothing else is skipped.

    Where the step was made more than once (after a rollback), the last time counts. Without a tokenizer the text is
    the token numbers.
    Errors: ConfigError if there is no such run, the step is below 1, or the data is gone.
    """
    if step < 1:
        raise ConfigError(f"--step is {step}: steps count from 1.")
    newest, file = load_config(run / CONFIG), find_config_of_step(run, step)
    config = load_config(file)
    earlier = file != find_config_of_step(run, NEVER)
    _follow_moved_files(config, newest)
    config.data.prefetch = 0
    state = _saved(newest.checkpoint.path or run)
    records, events = read_steps(run / "metrics.jsonl"), read_events(run / "events.jsonl")
    if earlier and state is not None and step <= state["step"]:
        state = _before(state, records, step)
    loader = Loader(config, Axis("data"))
    try:
        _as_it_was(loader, events, step, state)
        saved = (int(state["step"]), int(state["loader"]["samples_consumed"])) if state else (0, 0)
        positions, recorded = find_positions_of_step(records, events, step, loader.curriculum, saved)
        tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        samples = []
        for place, tokens in zip(loader.describe(positions), loader.tokens(positions), strict=True):
            ids = [int(token) for token in tokens[:-1]]
            samples.append({**place, "text": tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))})
        return {"run": str(run), "step": step, "recorded": recorded, "samples": samples}
    finally:
        loader.close()


def _follow_moved_files(config: Config, newest: Config) -> None:
    """Read each source, and the tokenizer, where the run has them now: a run may go on with data that was moved, and the
    loader sees to it that a source's name means the same tokens."""
    now = dict(zip(name_sources(newest.data.train), newest.data.train, strict=True))
    names = name_sources(config.data.train)
    config.data.train = [now.get(name, prefix) for name, prefix in zip(names, config.data.train, strict=True)]
    if newest.data.tokenizer is not None:
        config.data.tokenizer = newest.data.tokenizer


def _before(state: dict[str, Any], records: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """A later attempt's state as it was before a step that was made with other settings: what came after it, sources that
    it did not have among them, is not to be laid over it."""
    end = next((int(r["samples"]) for r in reversed(records) if r["step"] == step - 1), 0 if step == 1 else None)
    if end is None:
        return state
    loader = state["loader"]
    stream = loader["stream"]
    if "segments" in stream:
        kept = [segment for segment in stream["segments"] if segment["start"] <= end]
        known = {name for segment in kept for name, weight in segment["weights"].items() if weight > 0}
        sources = {name: samples for name, samples in stream["sources"].items() if name in known}
        stream = {**stream, "segments": kept, "sources": sources}
    skipped = [pair for pair in loader["skipped"] if pair[0] < end]
    loader = {**loader, "samples_consumed": end, "batches": step - 1, "skipped": skipped, "stream": stream}
    return {**state, "step": step - 1, "loader": loader}


def _saved(place: Path | str) -> dict[str, Any] | None:
    """Read the state of the newest checkpoint, which knows of every change of the mixture before it."""
    try:
        state = CheckpointReader(place).state()
    except (CheckpointError, ConfigError, OSError):
        return None  # none was saved yet
    return state if "loader" in state else None


def _as_it_was(loader: Loader, events: Sequence[dict[str, Any]], step: int, state: dict[str, Any] | None) -> None:
    """Gives the loader the stream that the step saw: mixtures and phases, what was left out, orders that the guard
    changed."""
    known = set()
    if state is not None:
        loader.load_state_dict(state["loader"])
        known = {(r["seed"], r["position"]) for r in state["loader"]["stream"].get("reseeds", ())}
    for first, last in find_skipped_ranges(events, step):  # phases begin later by what was left out before
        loader.skip(first, last)
    # Of one decision the last event counts: a run that died while it went back went back again.
    reseeds = {e["seed"]: e for e in events if e["kind"] == "reseed" and e["to_step"] < step}
    for event in sorted(reseeds.values(), key=lambda e: e["position"]):
        if (event["seed"], event["position"]) not in known:
            loader.reseed(event["seed"], event["position"])


def find_positions_of_step(
    records: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    step: int,
    curriculum: Curriculum,
    saved: tuple[int, int] = (0, 0),
) -> tuple[np.ndarray, bool]:
    """Find where in the stream the step's global batch lies, and whether the records say so (else it is not made yet).

    records: of metrics.jsonl; events: of events.jsonl, for what the guard left out; saved: a step and the position in the
    stream after it, for what lies beyond the records. The curriculum says how many samples a step takes where that does
    not follow from the records.

    Shapes: -> int64 [global batch]
    """
    skipped = find_skipped_ranges(events, step)
    count = curriculum.at(step - 1).global_batch_size
    at = next((i for i in range(len(records) - 1, -1, -1) if records[i]["step"] == step), None)
    if at is None:
        before = [(r["step"], r["samples"]) for r in records if r["step"] < step]
        past = max([(0, 0), before[-1] if before else (0, 0), saved if saved[0] < step else (0, 0)])
        return take(advance(past[1], curriculum.samples(past[0], step - 1), skipped), count, skipped)[0], False
    end = int(records[at]["samples"])
    start = next((int(r["samples"]) for r in reversed(records[:at]) if r["step"] == step - 1), 0 if step == 1 else None)
    if start is None:
        return take_back(end, count, skipped), True
    inside = [(max(a, start), min(b, end)) for a, b in skipped if a < end and b > start]
    return take(start, end - start - sum(b - a for a, b in inside), skipped)[0], True


def find_skipped_ranges(events: Sequence[dict[str, Any]], step: int) -> list[tuple[int, int]]:
    """Find the ranges of the stream that were left out, as decided before this step was made the last time."""
    ranges = []
    for event in events:
        decision, samples = event.get("decision"), event.get("samples")
        if not decision or not samples or decision["action"] in ("skip", "replay", "give_up"):
            continue
        if event.get("to_step", decision["step"]) < step:
            ranges.append((int(samples[0]), int(samples[1])))
    return merge_ranges(ranges)
