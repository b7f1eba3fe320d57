"""Which samples a step of a run was made from, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.compose import load_config
from megalm.config.errors import ConfigError
from megalm.data.loader import Loader
from megalm.data.stream import merge_ranges, take
from megalm.data.tokenizer import load_tokenizer
from megalm.observe.events import read_events, read_json_lines
from megalm.parallel.mesh import Axis


def samples_of_step(run: Path, step: int) -> list[dict[str, Any]]:
    """Every sample of the step's global batch: source, document, offset, position in the stream, and text.

    Where the step was made more than once (after a rollback), the last time counts. Without a tokenizer the text is
    the token numbers.
    Errors: ConfigError if there is no such run or step, or its data is gone.
    """
    config = load_config(run / "config.yaml")
    positions = positions_of_step(run, step, config.train.global_batch_size)
    config.data.prefetch = 0
    loader = Loader(config, Axis("data"))
    # Of one decision the last event counts: a run that died while it went back went back again.
    events = {e["seed"]: e for e in read_events(run / "events.jsonl") if e["kind"] == "reseed" and e["to_step"] < step}
    for event in sorted(events.values(), key=lambda e: e["position"]):
        loader.reseed(event["seed"], event["position"])
    try:
        tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        found = []
        for described in loader.describe(positions):
            tokens = loader.tokens([described["position"]])[0]
            ids = [int(token) for token in tokens[:-1]]
            text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
            found.append({**described, "text": text})
        return found
    finally:
        loader.close()


def positions_of_step(run: Path, step: int, batch_size: int) -> np.ndarray:
    """Positions in the stream of the step's global batch, from metrics.jsonl and the ranges that the guard skipped.

    Shapes: -> int64 [global batch]
    """
    records = read_json_lines(run / "metrics.jsonl")
    at = next((i for i in range(len(records) - 1, -1, -1) if records[i]["step"] == step), None)
    if at is None:
        known = sorted({record["step"] for record in records})
        span = f"it holds steps {known[0]} to {known[-1]}" if known else "it is not there, or empty"
        raise ConfigError(f"step {step} is not in {run / 'metrics.jsonl'}: {span}.")
    before = next((r["samples"] for r in reversed(records[:at]) if r["step"] == step - 1), None)
    if before is None:
        before = records[at]["samples"] - batch_size
    return take(before, batch_size, skipped_ranges(run, step))[0]


def skipped_ranges(run: Path, step: int) -> list[tuple[int, int]]:
    """Ranges of the stream that were left out, as far as they were decided before this step was made the last time."""
    ranges = []
    for event in read_events(run / "events.jsonl"):
        decision, samples = event.get("decision"), event.get("samples")
        if not decision or not samples or decision["action"] in ("skip", "replay", "give_up"):
            continue
        if event.get("to_step", decision["step"]) < step:
            ranges.append((int(samples[0]), int(samples[1])))
    return merge_ranges(ranges)
