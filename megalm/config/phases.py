"""The curriculum of a run: phases, each with its length, mixture, sequence length and learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.fields import number

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
SCHEDULES = ("constant", "linear", "cosine")


def parse_quantity(value: Any) -> float:
    """Parse a number such as 335B, 1.4T, 33.5% or 0.335.

    Errors: ValueError when it is none.
    """
    if isinstance(value, (int, float)):
        return float(value)
    text = str(value).strip().replace("_", "")
    if text.endswith("%"):
        return float(text[:-1]) / 100
    if text and text[-1].lower() in SUFFIXES:
        return float(text[:-1]) * SUFFIXES[text[-1].lower()]
    return float(text)


@dataclass
class PhaseConfig:
    """One phase of a curriculum. What is left out is as in the run's other settings."""

    name: str = ""
    """What it is called in the table, the records and messages."""
    tokens: Any = None
    """Length in tokens: 1e9, 10T; or give `steps`."""
    steps: int | None = number(None, at_least=1)
    """Length in updates; or give `tokens`."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Source -> proportion (0.7 or 70%), epochs in this phase (2x), or tokens (300M); empty: `data.weights`."""
    seq_length: int | None = number(None, at_least=1)
    """Tokens of a sequence, a divisor of model.seq_length; None: model.seq_length."""
    global_batch_size: int | None = number(None, at_least=1)
    """Sequences in one update; None: train.global_batch_size."""
    schedule: str | None = None
    """Course of the learning rate within this phase: constant, linear or cosine; None: the run's own goes on."""
    lr: float | None = number(None, above=0)
    """With `schedule`: where it starts; None: where the phase before ended (the first phase: optim.lr)."""
    min_lr: float | None = number(None, at_least=0)
    """With `schedule`: where it ends; None: optim.min_lr."""
    warmup_steps: int = number(0, at_least=0)
    """With `schedule`: updates of linear change from where the phase before ended to `lr`."""


@dataclass(frozen=True)
class Span:
    """A phase with its place in the run: updates [first_step, end_step)."""

    phase: PhaseConfig
    first_step: int
    end_step: int
    seq_length: int
    global_batch_size: int

    @property
    def tokens(self) -> int:
        """Of the whole phase."""
        return (self.end_step - self.first_step) * self.seq_length * self.global_batch_size


def parse_share(where: str, value: Any) -> tuple[str, float]:
    """("proportion" | "epochs" | "tokens", figure) of an entry of `mixture`.

    Errors: ConfigError for one that is none of them, or negative.
    """
    try:
        text = str(value).strip()
        if text.endswith("x"):
            kind, figure = "epochs", float(text[:-1])
        else:
            figure = parse_quantity(value)
            kind = "proportion" if text.endswith("%") or figure <= 1 else "tokens"
        if not 0 <= figure < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{where}: {value!r} is neither a proportion (0.7 or 70%), nor epochs (2x), nor tokens (300M)."
        ) from None
    return kind, figure


def list_spans(
    phases: Sequence[PhaseConfig], *, seq_length: int, global_batch_size: int, micro_batch_size: int
) -> list[Span]:
    """List the phases with their first and last steps.

    Errors: ConfigError for the first thing in them that cannot work.
    """
    found: list[Span] = []
    for place, phase in enumerate(phases):
        where = f"data.phases[{place}]" + (f" ({phase.name})" if phase.name else "")
        if not phase.name or phase.name in {span.phase.name for span in found}:
            raise ConfigError(f"{where}: each phase needs a name of its own.")
        length, batch = phase.seq_length or seq_length, phase.global_batch_size or global_batch_size
        if length < 1 or seq_length % length:
            divisors = [n for n in range(1, seq_length + 1) if seq_length % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - length))[:4])
            raise ConfigError(
                f"{where}: seq_length={length} does not divide model.seq_length={seq_length}, the longest of the run: "
                f"choose among {', '.join(map(str, near))}."
            )
        if batch < 1 or batch % micro_batch_size:
            raise ConfigError(
                f"{where}: global_batch_size={batch} is not a multiple of train.micro_batch_size={micro_batch_size}."
            )
        if (phase.tokens is None) == (phase.steps is None):
            raise ConfigError(f"{where}: give either its tokens or its steps.")
        try:
            steps = (
                phase.steps if phase.steps is not None else math.ceil(parse_quantity(phase.tokens) / (length * batch))
            )
        except (ValueError, OverflowError):
            raise ConfigError(f"{where}: tokens={phase.tokens!r}: write a number such as 1e9 or 10T.") from None
        if steps < 1:
            raise ConfigError(f"{where}: it has {steps} steps; a phase needs at least one.")
        for name, value in phase.mixture.items():
            parse_share(f"{where}: mixture: {name}", value)
        _check_rate(where, phase, steps)
        first = found[-1].end_step if found else 0
        found.append(Span(phase, first, first + steps, length, batch))
    return found


def _check_rate(where: str, phase: PhaseConfig, steps: int) -> None:
    if phase.schedule is None:
        if phase.lr is not None or phase.min_lr is not None or phase.warmup_steps:
            raise ConfigError(
                f"{where}: lr, min_lr and warmup_steps belong to a schedule of the phase's own: add schedule: "
                f"{' | '.join(SCHEDULES)}."
            )
        return
    if phase.schedule not in SCHEDULES:
        raise ConfigError(f"{where}: schedule={phase.schedule}: not one of {', '.join(SCHEDULES)}.")
    if phase.lr is not None and phase.min_lr is not None and phase.min_lr > phase.lr:
        raise ConfigError(f"{where}: min_lr={phase.min_lr:g} lies above lr={phase.lr:g}.")
    room = steps - (1 if phase.schedule == "constant" else 2)  # the peak and the end each take an update
    if phase.warmup_steps > max(0, room):
        raise ConfigError(
            f"{where}: warmup_steps={phase.warmup_steps} leaves nothing of its {steps} steps for the schedule: at most "
            f"{max(0, room)}."
        )


def list_configured_spans(config: Any) -> list[Span]:
    """`list_spans` of a whole configuration; empty for a run without phases."""
    return list_spans(
        config.data.phases,
        seq_length=config.model.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
    )
