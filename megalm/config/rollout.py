"""What a run that learns from its own texts writes, and how that is judged."""

from dataclasses import dataclass, field

from megalm.config.effects import Aside, Course, Layout, Order
from megalm.config.errors import ConfigError
from megalm.config.fields import choice, number


@dataclass
class RolloutConfig:
    """Prompts, completions and rewards, for objective.name=policy; an update takes train.global_batch_size completions."""

    prompts: Order[list[str]] = field(default_factory=list)
    """Files (.jsonl, .json, .parquet) of records with `prompt`, a text or a list of messages, and what rewards need
    (`answer`)."""
    template: Order[str | None] = None
    """A chat template (Jinja) for prompts that are messages; None: the tokenizer's own."""
    group_size: Order[int] = number(8, at_least=1)
    """Completions of each prompt, which are compared with each other."""
    max_tokens: Order[int] = number(256, at_least=1)
    """Most tokens of a completion; a longer one is cut."""
    temperature: Course[float] = number(1.0, above=0)
    """At which tokens are drawn, and log-probabilities trained. Nothing else is cut off the distribution."""
    updates: Order[int] = number(1, at_least=1)
    """Updates that the completions of one rollout are dealt to."""
    epochs: Order[int] = number(1, at_least=1)
    """Times that each of them is learned from."""
    rewards: Course[list[str]] = field(default_factory=list)
    """exact (the answer, blanks left aside), number (the text's last number is the answer), math (math-verify), or
    FILE.py:FUNCTION, called as FUNCTION(prompt, completion, record), which gives a number."""
    reward_weights: Course[list[float]] = number(list)
    """Of each reward in their sum; empty: 1 each."""
    reward_timeout_s: Aside[float] = number(30.0, above=0)
    """Seconds that one call of a FUNCTION may take."""
    reward_retries: Aside[int] = number(1, at_least=0)
    """Further calls after one that raised, took too long, or gave no finite number."""
    reward_failure: Course[str] = choice("stop", "count")
    """What then. stop: the run ends, with the prompt; count: the completion is left out, and counted in reward/failed."""
    cut: Course[str] = choice("mask", "zero", "keep")
    """Of completions cut at max_tokens. mask: they count in their group, and nothing is learned from them; zero: their reward
    is 0; keep: they are like the others."""
    packing: Layout[bool] = True
    """Several completions in one sequence, kept apart by mask and positions; false: each in its own."""
    rows: Layout[int] = number(64, at_least=1)
    """Completions that a rank writes at once; each takes a key/value cache."""
    samples: Aside[int] = number(1, at_least=0)
    """Groups of every rollout that are kept to be read, in the run's samples/rollouts.jsonl."""

    @property
    def budget(self) -> int:
        """Tokens that a text's loss is divided by where the objective wants one number for all."""
        return self.max_tokens


BUILT_IN = ("exact", "number", "math")
"""Rewards that need no file."""


def check_rollout(rollout: RolloutConfig, global_batch_size: int, *, wanted: bool) -> None:
    """wanted: the objective learns from rollouts. Errors: ConfigError"""
    if not wanted:
        usual = RolloutConfig()
        given = [key for key, value in vars(rollout).items() if value != getattr(usual, key)]
        if given:
            raise ConfigError(
                f"rollout.{given[0]} is read by objective.name=policy alone: choose an objective that writes, such as "
                "objective=dapo, or leave it out."
            )
        return
    if not rollout.prompts:
        raise ConfigError(
            "objective.name=policy learns from what the model writes: give prompts, rollout.prompts=[FILE.jsonl]."
        )
    if not rollout.rewards:
        raise ConfigError(
            f"objective.name=policy needs something to reward: rollout.rewards=[NAME], of {', '.join(BUILT_IN)}, or "
            "FILE.py:FUNCTION."
        )
    for name in rollout.rewards:
        if name not in BUILT_IN and ".py:" not in name:
            raise ConfigError(f"rollout.rewards: {name!r} is none of {', '.join(BUILT_IN)}, nor FILE.py:FUNCTION.")
    if rollout.reward_weights and len(rollout.reward_weights) != len(rollout.rewards):
        raise ConfigError(
            f"rollout.reward_weights has {len(rollout.reward_weights)} numbers for {len(rollout.rewards)} rewards: give one for "
            "each."
        )
    if global_batch_size % rollout.group_size:
        below = global_batch_size // rollout.group_size * rollout.group_size
        near = " or ".join(str(n) for n in (below, below + rollout.group_size) if n)
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} completions are no whole groups of rollout.group_size="
            f"{rollout.group_size}: use {near}."
        )
