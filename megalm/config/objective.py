"""What a run minimises, and what each objective is told."""

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from megalm.config.effects import Course, Function
from megalm.config.errors import ConfigError


@dataclass
class ObjectiveConfig:
    """The objective: `objective=NAME` chooses a file of conf/objective, `objective.name` the objective itself.

    An objective's own settings are a group of its name; those of an objective that was not chosen are refused.
    """

    name: Function[str] = "next_token"
    """next_token (pretraining and fine-tuning), or the name under which a plugin registered its own."""
    options: Course[dict[str, Any]] = field(default_factory=dict)
    """Settings of an objective that is not megalm's own, by name."""


def check_objective(objective: ObjectiveConfig) -> None:
    """Errors: ConfigError for settings of an objective that was not chosen."""
    for part in fields(objective):
        group = getattr(objective, part.name)
        if not is_dataclass(group) or part.name == objective.name:
            continue
        assert part.default_factory is not NO_DEFAULT
        usual = part.default_factory()
        given = [key for key, value in vars(group).items() if value != getattr(usual, key)]
        if given:
            raise ConfigError(
                f"objective.{part.name}.{given[0]} is read by objective.name={part.name} alone, and objective.name="
                f"{objective.name}: leave it out, or choose that objective."
            )
