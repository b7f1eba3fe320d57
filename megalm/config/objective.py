"""What a run minimises, and what each objective is told."""

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from megalm.config.effects import Course, Function
from megalm.config.errors import ConfigError
from megalm.config.fields import choice, number
from megalm.config.policy import PolicyConfig, check_policy

PAIRED = ("preference", "reward")
"""Objectives of megalm's own that learn from pairs of answers."""
VALUED = ("reward",)
"""Objectives whose model has a value head."""
BUILT_IN = ("next_token", "policy", *PAIRED)


@dataclass
class PreferenceConfig:
    """Of two answers the better one is to become likelier than the worse one."""

    loss: str = choice("sigmoid", "conservative", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "simpo", "orpo")
    """Of a pair. sigmoid: DPO; conservative, robust: DPO where a share of the judgements is wrong (label_smoothing); hinge; ipo;
    sigmoid_norm: DPO of means over tokens; apo_zero; simpo, orpo: without a reference."""
    beta: float = number(0.1, above=0)
    """How much a log-ratio to the reference is worth as a reward; SimPO takes 2 to 10, ORPO weighs its odds by it."""
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    """Share of judgements taken to be wrong; of conservative and robust."""
    target_margin: float = number(0.5, at_least=0)
    """simpo: by how much the better answer's reward should be above the worse one's."""
    sft_weight: float = number(0.0, at_least=0)
    """Added times the mean loss of a token of the chosen answer."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss is of ratios to the weights that the run began with."""
        return self.loss not in ("simpo", "orpo")


@dataclass
class RewardConfig:
    """A number for each answer, higher for the better one of a pair."""

    centering: float = number(0.01, at_least=0)
    """Weight of (r chosen + r rejected)^2, which keeps rewards around 0 (Eisenstein et al. 2023); 0: they may drift."""


@dataclass
class ObjectiveConfig:
    """The objective: `objective=NAME` chooses a file of conf/objective, `objective.name` the objective itself.

    An objective's own settings are a group of its name; those of an objective that was not chosen are refused.
    """

    name: Function[str] = "next_token"
    """next_token (pretraining and fine-tuning), preference (DPO and its kin), reward (a reward model), policy (reinforcement:
    the run learns from texts that it writes), or the name under which a plugin registered its own."""
    preference: Course[PreferenceConfig] = field(default_factory=PreferenceConfig)
    """Of two answers the better one."""
    reward: Course[RewardConfig] = field(default_factory=RewardConfig)
    """A number for each answer."""
    policy: Course[PolicyConfig] = field(default_factory=PolicyConfig)
    """Settings of reinforcement."""
    options: Course[dict[str, Any]] = field(default_factory=dict)
    """Settings of an objective that is not megalm's own, by name."""


def check_objective(objective: ObjectiveConfig) -> None:
    """Errors: ConfigError for settings of an objective that was not chosen, or that contradict each other."""
    check_policy(objective.policy)
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
    preference, smoothed = objective.preference, ("conservative", "robust")
    if preference.label_smoothing and preference.loss not in smoothed:
        raise ConfigError(
            f"objective.preference.label_smoothing={preference.label_smoothing:g} is read by the losses {' and '.join(smoothed)} "
            f"alone, and objective.preference.loss={preference.loss}: choose one of them, or leave it out."
        )
