"""Objectives by the name that `objective.name` calls them. A plugin adds one with `register_objective`."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from megalm.config import Config, ConfigError
from megalm.objectives.next_token import NextToken
from megalm.objectives.objective import Objective
from megalm.objectives.policy import Policy
from megalm.objectives.preference import Preference
from megalm.objectives.reward import Reward

Builder = Callable[[Config], Objective]
"""Makes an objective of a run's resolved configuration; alike on every rank."""


def _build_next_token(config: Config) -> Objective:
    sources = len(config.data.train)
    return NextToken(config.model.z_loss, sources if sources > 1 else 0)


def _build_preference(config: Config) -> Objective:
    return Preference(config.objective.preference)


def _build_policy(config: Config) -> Objective:
    return Policy(config.objective.policy, config.rollout.budget, config.rollout.temperature)


def _build_reward(config: Config) -> Objective:
    return Reward(config.objective.reward)


_BUILDERS: dict[str, Builder] = {
    "next_token": _build_next_token,
    "policy": _build_policy,
    "preference": _build_preference,
    "reward": _build_reward,
}


def register_objective(name: str, build: Builder) -> None:
    """Let `objective.name=NAME` mean this objective. Its settings are `config.objective.options`.

    Errors: ValueError where the name is taken.
    """
    if _BUILDERS.get(name, build) is not build:
        raise ValueError(f"an objective is called {name!r} already: register yours under another name.")
    _BUILDERS[name] = build


def find_builder(name: str) -> Builder:
    """Find what builds the objective of this name. Errors: ConfigError for an unknown one"""
    if name not in _BUILDERS:
        close = get_close_matches(name, _BUILDERS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"objective.name={name}: there is no such objective.{hint} Known are {', '.join(sorted(_BUILDERS))}."
        )
    return _BUILDERS[name]


def build_objective(config: Config) -> Objective:
    """Build what the run minimises."""
    return find_builder(config.objective.name)(config)
