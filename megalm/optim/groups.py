"""Which parameters are updated alike: roles and names of tensors lead to a rule, a factor of the learning rate, a decay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megalm.config.errors import ConfigError
from megalm.config.optim import GroupConfig, OptimConfig
from megalm.optim.rules import RULES, AdamW, Rule
from megalm.parallel.slices import Role, Slice

NEVER_DECAYED = frozenset({Role.EMBEDDING, Role.NORM, Role.BIAS})
"""Pulling these towards zero holds nothing in bounds: a norm undoes the size of what follows it, and most rows of a table
get no gradient in a step, but would get the decay."""


MATRICES = frozenset({Role.MATRIX, Role.EXPERT_MATRIX})
"""Maps between hidden spaces. A table, an output matrix and a router are matrices in form alone: their rows are tokens or
experts, not directions."""


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


def choose_rule(optim: OptimConfig) -> Rule:
    """Choose the rule that `optim.name` asks for."""
    return RULES.find(optim.name)(optim)


def list_usual_choices(optim: OptimConfig) -> tuple[Choice, ...]:
    """List the configured rule for all parameters, or, where it is one for matrices, AdamW for the others; decay for those that
    need it; before all `optim.groups`."""
    rule = choose_rule(optim)
    usual: tuple[Choice, ...] = (Choice(Group(rule), NEVER_DECAYED), Choice(Group(rule, decay=optim.weight_decay)))
    if rule.whole_matrices:
        adamw, rate = AdamW(optim), optim.muon.adamw_rate
        usual = (
            Choice(Group(rule, decay=optim.weight_decay), MATRICES),
            Choice(Group(adamw, rate), NEVER_DECAYED),
            Choice(Group(adamw, rate, optim.weight_decay)),
        )
    rules = {optim.name: rule}
    own = [choice for group in optim.groups for choice in _choices_of(group, optim, usual, rules)]
    return (*own, *usual)


def _choices_of(
    group: GroupConfig, optim: OptimConfig, usual: Sequence[Choice], rules: dict[str, Rule]
) -> Iterator[Choice]:
    """What a group of the configuration asks for: a choice for each usual one whose rule or decay it leaves as it is."""
    try:
        roles = frozenset(Role(name) for name in group.roles)
    except ValueError:
        known = [role.value for role in Role if role is not Role.STATE]
        raise ConfigError(f"optim.groups: roles={group.roles}: known roles are {', '.join(known)}.") from None
    patterns = tuple(group.names) or ("*",)
    given = (
        None if group.rule is None else rules.get(group.rule) or rules.setdefault(group.rule, _make(group.rule, optim))
    )
    for choice in usual:
        shared = roles & choice.roles if roles and choice.roles else roles or choice.roles
        if roles and choice.roles and not shared:
            continue
        old = choice.group
        decay = old.decay if group.weight_decay is None else group.weight_decay
        yield Choice(Group(given or old.rule, old.rate * group.rate, decay), shared, patterns)


def _make(name: str, optim: OptimConfig) -> Rule:
    return RULES.find(name)(optim)


class Groups:
    """The group of each parameter: that of the first choice that takes it.

    Errors: ConfigError for a parameter that is no matrix, and a rule that updates matrices alone.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = tuple(choices)

    def of(self, slice_: Slice) -> Group:
        """The parameter's group; the last choice must take what the others leave."""
        group = next(choice.group for choice in self.choices if choice.takes(slice_))
        flat = [piece.name for piece in slice_.pieces if len(piece.global_shape) != 2]
        if group.rule.whole_matrices and flat:
            raise ConfigError(
                f"optim.groups gives {flat[0]}, which is no matrix, to a rule that updates matrices alone. Give it adamw, or "
                "name matrices only (roles: [matrix, expert_matrix])."
            )
        return group
