"""Prompts to write on from, with what their rewards need to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.posttrain.records import BadRecord, read_values
from megalm.posttrain.render import Renderer
from megalm.tokenizer.chat import check_messages


@dataclass(frozen=True)
class PromptRecord:
    """A prompt as the model reads it."""

    place: str
    """File and line."""
    text: str
    """What rewards and people are shown."""
    ids: tuple[int, ...]
    record: Mapping[str, Any]
    """The whole record, with its other columns."""
    file: int
    """Which of the files it is from."""


def read_prompts(files: Sequence[str], renderer: Renderer, longest: int) -> list[PromptRecord]:
    """Read all prompts. longest: most tokens that leave room for a completion.

    Errors: ConfigError with the place of a record without a prompt, or whose prompt is too long; where there is none at all
    """
    found = []
    for file, place, value in ((n, *pair) for n, name in enumerate(files) for pair in read_values(name)):
        if isinstance(value, BadRecord):
            raise value
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str | list):
            raise ConfigError(f"{place}: needs a field `prompt`: a text, or a list of messages.")
        prompt = value["prompt"]
        try:
            messages = None if isinstance(prompt, str) else check_messages(prompt)
            ids = renderer.render_prompt(prompt if messages is None else messages)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        if not 0 < len(ids) <= longest:
            raise ConfigError(
                f"{place}: its prompt has {len(ids)} tokens, and model.seq_length with rollout.max_tokens leaves room for 1 to "
                f"{longest}: shorten it, or set rollout.max_tokens lower."
            )
        text = prompt if messages is None else "\n".join(f"{one['role']}: {one['content']}" for one in messages)
        found.append(PromptRecord(place, str(text), tuple(ids), value, file))
    if not found:
        raise ConfigError(f"rollout.prompts: no prompt is in {', '.join(files)}.")
    return found


def name_files(files: Sequence[str]) -> list[str]:
    """Name what each file is called in the metrics: its name without folder and ending, with its number where two are alike."""
    stems = [Path(file).name.split(".")[0] for file in files]
    return [f"{stem}_{number}" if stems.count(stem) > 1 else stem for number, stem in enumerate(stems, 1)]
