"""Which parameters are updated alike: roles and names of tensors lead to a rule, a factor of the learning rate, a decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megalm.config.errors import ConfigError
from megalm.config.optim import OptimConfig
from megalm.optim.rules import RULES, Rule
from megalm.parallel.slices import Role, Slice

NEVER_DECAYED = frozenset({Role.EMBEDDING, Role.NORM, Role.BIAS})
"""Pulling these towards zero holds nothing in bounds: a norm undoes the size of what follows it, and most rows of a table
get no gradient in a step, but would get the decay."""


@dataclass(frozen=True)
class Group:
    """How some parameters are updated. rate: a factor of the learning rate; decay: per unit of the learning rate."""

    rule: Rule
    rate: float = 1.0
    decay: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Gives a group to the parameters of some roles (none: all) whose tensors' names match one of the patterns."""

    group: Group
    roles: frozenset[Role] = frozenset()
    patterns: tuple[str, ...] = ("*",)

    def takes(self, slice_: Slice) -> bool:
        """Whether the group is for this parameter. Errors: ConfigError where the patterns match some of the tensors that are
        stored together, and not others."""
        if self.roles and slice_.role not in self.roles:
            return False
        matched = {p.name: any(fnmatchcase(p.name, pattern) for pattern in self.patterns) for p in slice_.pieces}
        if len(set(matched.values())) > 1:
            inside = [name for name, found in matched.items() if found]
            raise ConfigError(
                f"a group for {', '.join(self.patterns)} takes {', '.join(inside)}, but these are stored together with "
                f"{', '.join(name for name in matched if name not in inside)}: name all of them, or none."
            )
        return all(matched.values())


def rule_of(optim: OptimConfig) -> Rule:
    """The rule that `optim.name` asks for."""
    if optim.name not in RULES:
        raise ConfigError(f"optim.name={optim.name}: there is no such update rule. Known: {', '.join(sorted(RULES))}.")
    return RULES[optim.name](optim)


def usual_choices(optim: OptimConfig) -> tuple[Choice, ...]:
    """The configured rule for all parameters, and decay for those that need it."""
    rule = rule_of(optim)
    return (Choice(Group(rule), NEVER_DECAYED), Choice(Group(rule, decay=optim.weight_decay)))


class Groups:
    """The group of each parameter: that of the first choice that takes it."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = tuple(choices)

    def of(self, slice_: Slice) -> Group:
        """The parameter's group; the last choice must take what the others leave."""
        return next(choice.group for choice in self.choices if choice.takes(slice_))
