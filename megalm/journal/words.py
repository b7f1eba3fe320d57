"""Events in words: one sentence for the console, TensorBoard, the report and the tools.

An event may come from this process, or from a file: of an older version, of another hand, with numbers that are not finite
or not there. Every event has words; none raises.
"""

from collections.abc import Sequence
from typing import Any

from megalm.journal.numbers import format_number, is_finite, read_number

QUIET = {"checkpoint", "start", "end", "observe"}
"""Kinds that tell of an undisturbed run: not shown on curves."""

_WORDS = {
    "onset": "onset {}",
    "cause": "cause {}",
    "to_step": "back to step {}",
    "what": "{}",
    "rank": "rank {}",
    "error": "{}",
    "exit": "{}",
    "signal": "{}",
    "phase": "at {}",
    "where": "in {}",
    "source": "from {}",
    "lost_steps": "steps done again: {}",
    "device": "on {}",
    "world_size": "ranks: {}",
    "torch": "torch {}",
    "name": "{}",
}
"""Fields of events that are told as they are."""


def describe_event(event: dict[str, Any]) -> str:
    """Tell an event to a person: what it was, its onset and cause, what was measured, and what was done."""
    words = describe_event_details(event)
    return f"{event.get('kind', 'event')} at step {event.get('step', '?')}" + (f", {words}" if words else "")


def describe_event_details(event: dict[str, Any]) -> str:
    """Say what `describe_event` says after kind and step."""
    parts = []
    for key, text in _WORDS.items():
        if event.get(key) is not None and not (key == "what" and "text" in event):
            parts.append(text.format(event[key]))
    if event.get("bytes") is not None:
        parts.append(f"{format_number(event['bytes'], ',.0f')} bytes")
    parts += _measured(event)
    why = event.get("why")
    if why:
        parts.append(f"out of line: {', '.join(map(str, why)) if isinstance(why, list | tuple) else why}")
    if (samples := _range(event.get("samples"))) and event.get("kind") != "spike":
        parts.append(f"samples {samples[0]} to {samples[1] - 1} skipped")
    if event.get("lr_scale") is not None and read_number(event["lr_scale"]) != 1.0:
        parts.append(f"learning rate x {format_number(event['lr_scale'])}")
    if event.get("silent_s") is not None:
        parts.append(f"silent for {format_number(event['silent_s'], '.3g')} s")
    if event.get("seconds") is not None:
        parts.append(f"in {format_number(event['seconds'], '.3g')} s")
    if event.get("stall_s") is not None:
        parts.append(f"of which the step waited {format_number(event['stall_s'], '.2g')} s")
    if event.get("kind") != "give_up":
        parts += [event[key] for key in ("text", "reason") if isinstance(event.get(key), str)]
    return ", ".join(parts)


def _measured(event: dict[str, Any]) -> list[str]:
    """Tell the loss beside what was expected, as far as either says something, and a gradient norm that is no number."""
    if "expected" not in event:
        return []
    parts = []
    loss, expected = event.get("loss"), event["expected"]
    if loss is not None:
        beside = f" where {format_number(expected, '.4f')} was expected" if is_finite(expected) else ""
        parts.append(f"loss {format_number(loss, '.4f')}{beside}")
    norm = event.get("grad_norm")
    if read_number(norm) is not None and not is_finite(norm):
        parts.append(f"gradient norm {format_number(norm)}")
    return parts


def _range(value: Any) -> Sequence[int] | None:
    """(first, behind the last) of a range of samples; None where the value is none."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(is_finite, value)):
        return None
    return int(value[0]), int(value[1])
