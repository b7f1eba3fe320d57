"""A curriculum over opened sources: what each phase draws from where, by name and in whole numbers of updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.phases import Span, parse_share

SHARE_TOLERANCE = 0.005
"""Targets that should fill a phase may miss its length by rounding; what is missing is shared in proportion."""


@dataclass(frozen=True)
class Phase:
    """Updates [first_step, end_step) of one mixture; end_step None: until the run ends."""

    name: str
    first_step: int
    end_step: int | None
    seq_length: int
    global_batch_size: int
    weights: dict[str, float]

    @property
    def tokens(self) -> int | None:
        """Of the whole phase."""
        if self.end_step is None:
            return None
        return (self.end_step - self.first_step) * self.seq_length * self.global_batch_size

    def share(self, source: str) -> float:
        """Proportion of a source, 0..1."""
        return self.weights.get(source, 0.0) / sum(self.weights.values())


class Curriculum:
    """The phases of a run; a run without any is one phase without end."""

    def __init__(self, phases: Sequence[Phase]):
        self.phases = list(phases)

    def at(self, step: int) -> Phase:
        """The phase of update number `step`, counted from 0; after the last, the last."""
        return next((p for p in self.phases if p.end_step is None or step < p.end_step), self.phases[-1])

    def samples(self, first_step: int, end_step: int) -> int:
        """Samples that updates [first_step, end_step), counted from 0, take together."""
        total = 0
        for phase in self.phases:
            end = end_step if phase.end_step is None else min(phase.end_step, end_step)
            total += max(0, end - max(phase.first_step, first_step)) * phase.global_batch_size
        return total


def make_single_phase(weights: Mapping[str, float], seq_length: int, global_batch_size: int) -> Curriculum:
    """Make the curriculum of a run without phases."""
    return Curriculum([Phase("", 0, None, seq_length, global_batch_size, dict(weights))])


def make_curriculum(spans: Sequence[Span], weights: Mapping[str, float], available: Mapping[str, int]) -> Curriculum:
    """Phases with weights by source.

    weights: of the run (`data.weights`, or the sources' sizes), for phases without a mixture.
    available: tokens of each source, to know what an epoch is.
    Errors: ConfigError for a source that is not there, or targets that do not fit into the phase.
    """
    phases = []
    for number, span in enumerate(spans):
        where = f"data.phases[{number}] ({span.phase.name})"
        mixture = _weights(where, span, available) if span.phase.mixture else dict(weights)
        last = number == len(spans) - 1
        phases.append(
            Phase(
                span.phase.name,
                span.first_step,
                None if last else span.end_step,
                span.seq_length,
                span.global_batch_size,
                mixture,
            )
        )
    return Curriculum(phases)


def _weights(where: str, span: Span, available: Mapping[str, int]) -> dict[str, float]:
    """Shares that sum to 1: targets take theirs of the phase's tokens, proportions divide what is left."""
    targets: dict[str, float] = {}
    proportions: dict[str, float] = {}
    for name, value in span.phase.mixture.items():
        if name not in available:
            raise ConfigError(
                f"{where}: there is no source {name!r}. Sources in data.train: {', '.join(available) or 'none'}."
            )
        kind, figure = parse_share(f"{where}: mixture: {name}", value)
        if kind == "proportion":
            proportions[name] = figure
        else:
            targets[name] = (figure * available[name] if kind == "epochs" else figure) / span.tokens
    taken = sum(targets.values())
    if taken > 1 + SHARE_TOLERANCE or (not any(proportions.values()) and taken < 1 - SHARE_TOLERANCE):
        asked = ", ".join(f"{name} {share * span.tokens:.4g}" for name, share in targets.items())
        raise ConfigError(
            f"{where}: its sources ask for {taken * span.tokens:.4g} tokens ({asked or 'none'}), the phase has "
            f"{span.tokens:.4g}: change its tokens, or give some sources proportions, which share what targets leave."
        )
    scale = max(0.0, 1.0 - taken) / (sum(proportions.values()) or 1.0)
    return {name: targets.get(name, proportions.get(name, 0.0) * scale) for name in span.phase.mixture}


def tabulate_phases(curriculum: Curriculum, available: Mapping[str, int], total_steps: int) -> list[dict[str, Any]]:
    """Tabulate the curriculum: for each phase and source tokens, share, epochs in the phase and up to its end."""
    rows: list[dict[str, Any]] = []
    drawn = dict.fromkeys(available, 0.0)
    for phase in curriculum.phases:
        end = min(phase.end_step or total_steps, total_steps)
        steps = max(0, end - phase.first_step)
        tokens = steps * phase.seq_length * phase.global_batch_size
        for source, size in available.items():
            share = phase.share(source)
            if share == 0:
                continue
            drawn[source] += share * tokens
            rows.append(
                {
                    "phase": phase.name,
                    "first_step": phase.first_step + 1,
                    "last_step": end,
                    "seq_length": phase.seq_length,
                    "global_batch_size": phase.global_batch_size,
                    "source": source,
                    "share": share,
                    "tokens": share * tokens,
                    "epochs": share * tokens / size if size else None,
                    "epochs_so_far": drawn[source] / size if size else None,
                }
            )
    return rows
