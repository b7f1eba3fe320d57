"""Two configurations compared: what differs, what each difference decides, and whether a run may go on with it."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from megalm.config.effects import Effect, list_effects
from megalm.config.errors import ConfigError
from megalm.config.root import Config

_NAMED = 12
"""Changes that a line names; the event has all of them."""


@dataclass(frozen=True)
class Change:
    """A setting with another value than before."""

    key: str
    before: Any
    now: Any
    effect: Effect

    def describe(self) -> str:
        """`optim.lr 0.003 -> 0.001`"""
        return f"{self.key} {_shown(self.before)} -> {_shown(self.now)}"

    def as_dict(self) -> dict[str, Any]:
        return {"key": self.key, "before": self.before, "now": self.now, "effect": self.effect.name.lower()}


def compare(before: Config, now: Config) -> list[Change]:
    """Every setting that differs and is of interest to whoever goes on with the run, in the order of the keys."""
    return [
        Change(key, old, new, effect)
        for key, effect in list_effects(now)
        if effect is not None
        and not effect.silent
        and (old := read_value(before, key)) != (new := read_value(now, key))
    ]


def check_changes(changes: Sequence[Change], allowed: Iterable[str], where: str, *, load: bool = False) -> None:
    """Refuse to go on with the state at `where` under changes that nobody asked for.

    allowed: `checkpoint.allow_changes`; load: the state was named by `checkpoint.load_path`.
    Errors: ConfigError with both values of each, and the key that allows them.
    """
    refused = [
        c for c in changes if c.effect.refused and not (is_allowed(c.key, allowed) and c.effect is not Effect.FIXED)
    ]
    if not refused:
        return
    lines = [
        f"  {c.key}: {_shown(c.before)} in the checkpoint, {_shown(c.now)} now ({c.effect.value})" for c in refused
    ]
    ways = ["Give the settings that it was made with" + ("" if load else ", or another run.name to begin a new run")]
    if not any(c.effect is Effect.FIXED for c in refused):
        keys = ",".join(c.key for c in refused)
        ways.append(f'to go on with these all the same: "checkpoint.allow_changes=[{keys}]"')
    raise ConfigError(f"{where} was made with other settings:\n" + "\n".join(lines) + f"\n{'; or '.join(ways)}.")


def check_allowed_keys(config: Config) -> None:
    """Errors: ConfigError for an entry of `checkpoint.allow_changes` that names no setting and no group of them."""
    keys = [key for key, _ in list_effects(config)]
    known = sorted({*keys, *(key.rpartition(".")[0] for key in keys if "." in key)})
    for name in config.checkpoint.allow_changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"checkpoint.allow_changes: {name!r} is no setting.{hint} Give keys such as train.seed, or a group of them "
                "such as model."
            )


def is_allowed(key: str, allowed: Iterable[str]) -> bool:
    """Whether a key, or a group that it belongs to, is among the allowed ones."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def describe_changes(changes: Sequence[Change]) -> str:
    """Describe the changes in one line."""
    more = f" and {len(changes) - _NAMED} more (config.yaml has them)" if len(changes) > _NAMED else ""
    return ", ".join(change.describe() for change in changes[:_NAMED]) + more


def read_value(config: Config, key: str) -> Any:
    """Read the value of a dotted key, as plain JSON has it."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return _plain(value)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
