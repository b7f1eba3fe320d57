"""What a run begins with: a checkpoint whose settings are compared with the run's, or nothing.

    check the place -> load -> set aside what is of another course -> tell where the run goes on

A checkpoint holds the whole configuration that it was made with. Going on under another one is refused where the model
would compute something else or other data would be seen, and told where the weights only move otherwise from there on.
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from megalm.architecture.tensors import is_added
from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.random_state import restore_random_state
from megalm.config import Config, ConfigError
from megalm.config.changes import Change, check_changes, compare, describe_changes
from megalm.config.effects import Effect
from megalm.config.phases import list_configured_spans
from megalm.config.saved import make_config
from megalm.optim.lr import compute_phased_learning_rate
from megalm.parallel.random import seed_of
from megalm.train.determinism import seed_everything
from megalm.train.earlier import check_place, make_way

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


@dataclass
class Origin:
    """Where a run's state comes from.

    kind: the event's, resume or load_weights; settings: what the checkpoint was made with (None: it does not say).
    """

    kind: str
    step: int
    fields: dict[str, Any]
    settings: Config | None
    changes: list[Change]
    unknown: list[str]
    """Settings of the checkpoint that this version does not have."""
    total_steps: int | None
    """Length of the run that made it."""


def resume(trainer: "Trainer") -> Origin | None:
    """Take up the run's newest good checkpoint, or what `checkpoint.load_path` is to begin with; None: it begins anew.

    Errors: ConfigError where none is usable, or it was made with settings that the run may not go on from.
    """
    try:
        check_place(trainer)
        origin = _load(trainer)
        make_way(trainer)
        return origin
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def _load(trainer: "Trainer") -> Origin | None:
    options = trainer.config.checkpoint
    if options.resume and trainer.checkpoints.latest() is not None:
        return _take_up(trainer, None)
    if options.load_path is None:
        return None
    if options.load == "weights":
        check = SettingsCheck(trainer.config, weights_only=True)
        trainer.checkpoints.load(
            trainer.boxes(), path=options.load_path, weights_only=True, optional=is_added, check=check
        )
        trainer.optimizer.gather_parameters()
        return check.origin("load_weights", 0, path=options.load_path)
    return _take_up(trainer, options.load_path)


def _take_up(trainer: "Trainer", path: str | None) -> Origin:
    """All of the state at `path`, or of the run's own newest checkpoint."""
    check = SettingsCheck(trainer.config, load=path is not None)
    state, rank_state = trainer.checkpoints.load(trainer.boxes(), path=path, check=check)
    trainer.restore(state, saved=path is None)
    if rank_state:
        restore_random_state(rank_state)
    else:  # on another layout there are no streams to go on with, and the first ones were used at the first steps
        seed_everything(seed_of("resume", trainer.config.train.seed, trainer.step), trainer.mesh)
    where = {} if path is None else {"path": path}
    return check.origin("resume", trainer.step, tokens=trainer.tokens, **where)


def tell_origin(trainer: "Trainer", environment: dict[str, object]) -> None:
    """Write down that the run begins, on what, from what, and what is set otherwise than before."""
    events, origin = trainer.events, trainer.origin
    if environment:
        events.write("start", step=trainer.step, **environment)
    if origin is None:
        return
    events.write(origin.kind, step=origin.step, **origin.fields)
    if (changed := list_changed_settings(trainer.config, origin)) is not None:
        events.write("changed", step=origin.step, **changed)


class SettingsCheck:
    """Compares the settings in each checkpoint that is about to be loaded with the run's; keeps what the last one held."""

    def __init__(self, config: Config, *, weights_only: bool = False, load: bool = False) -> None:
        self.config, self.weights_only, self.load = config, weights_only, load
        self.settings: Config | None = None
        self.changes: list[Change] = []
        self.unknown: list[str] = []
        self.total_steps: int | None = None

    def origin(self, kind: str, step: int, **told: Any) -> Origin:
        """What was loaded, for the run's events."""
        return Origin(kind, step, told, self.settings, self.changes, self.unknown, self.total_steps)

    def __call__(self, state: dict[str, Any], where: str) -> None:
        """Errors: ConfigError for changes that are refused."""
        self.settings, self.changes, self.unknown = None, [], []
        self.total_steps = state.get("total_steps")
        stored, converted = state.get("config"), state.get("model")
        if stored is not None:
            self.settings = self._read(stored, where)
            self.changes = compare(self.settings, self.config)
        elif converted is not None:
            imported = self._read({"model": converted}, where)
            self.changes = [change for change in compare(imported, self.config) if change.key.startswith("model.")]
        if (
            self.weights_only
        ):  # a new run, which may compute something else with them: told; shapes are compared elsewhere
            self.changes = [c for c in self.changes if c.key.startswith("model.") and c.effect is Effect.FUNCTION]
        else:
            check_changes(self.changes, self.config.checkpoint.allow_changes, where, load=self.load)

    def _read(self, stored: dict[str, Any], where: str) -> Config:
        """Read the stored settings; what an earlier version did not know has its default, which is what that version did."""
        known = Config()
        self.unknown = sorted(_unknown(stored, known))
        return make_config(_without(stored, self.unknown), f"the configuration in {where}")


def list_changed_settings(config: Config, origin: Origin) -> dict[str, Any] | None:
    """Fields of the event `changed`; None where the run goes on as it was."""
    if not origin.changes and not origin.unknown:
        return None
    parts = [describe_changes(origin.changes)] if origin.changes else []
    if origin.unknown:
        parts.append(f"settings that this version does not know: {', '.join(origin.unknown)}")
    event: dict[str, Any] = {"changes": [change.as_dict() for change in origin.changes]}
    if origin.kind == "load_weights":
        parts.append("the model computes something else with these weights than the one that they were made with")
    elif origin.settings is not None:
        before, now = compare_learning_rates(origin.settings, origin.total_steps, config, origin.step)
        if not math.isclose(before, now, rel_tol=1e-9):
            event |= {"lr_before": before, "lr_now": now}
            parts.append(
                f"the learning rate leaves its course: step {origin.step + 1} has {now:.3g} in place of {before:.3g}"
            )
    return event | {"text": "; ".join(parts)}


def compare_learning_rates(before: Config, total_before: int | None, now: Config, step: int) -> tuple[float, float]:
    """The learning rate of the update after `step` on the course of each configuration."""
    rates = []
    for config, total in ((before, total_before or before.train.steps), (now, now.train.steps)):
        rates.append(compute_phased_learning_rate(config.optim, list_configured_spans(config), step, total or step + 1))
    return rates[0], rates[1]


def _unknown(stored: dict[str, Any], known: Any, prefix: str = "") -> list[str]:
    names = {f.name for f in fields(known)}
    found = []
    for key, value in stored.items():
        if key not in names:
            found.append(f"{prefix}{key}")
        elif isinstance(value, dict) and is_dataclass(inner := getattr(known, key)):
            found += _unknown(value, inner, f"{prefix}{key}.")
    return found


def _without(stored: dict[str, Any], keys: list[str], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in stored.items():
        if f"{prefix}{key}" not in keys:
            kept[key] = _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
    return kept
