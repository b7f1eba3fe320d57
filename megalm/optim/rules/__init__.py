"""Update rules by their name in the configuration."""

from collections.abc import Sequence

from megalm.config.optim import READS, STATES
from megalm.config.registry import Registry
from megalm.optim.rules.adamw import AdamW
from megalm.optim.rules.muon import Muon
from megalm.optim.rules.rule import Rule, Update
from megalm.optim.rules.sgd import SGD
from megalm.optim.rules.whole import WholeMatrixRule

RULES: Registry[type[Rule]] = Registry("update rule", "optim.name", {"adamw": AdamW, "sgd": SGD, "muon": Muon})


def register_rule(name: str, rule: type[Rule], reads: Sequence[str] = ()) -> None:
    """Let `optim.name=NAME` mean this rule. reads: keys of optim beside lr, decay and clipping that it heeds, such as betas;
    those of other rules are refused. Its own settings are `optim.options`.

    Errors: ValueError where the name is taken.
    """
    RULES.register(name, rule)
    STATES[name], READS[name] = rule.states, tuple(reads)


__all__ = ["RULES", "AdamW", "Muon", "Rule", "SGD", "Update", "WholeMatrixRule", "register_rule"]
