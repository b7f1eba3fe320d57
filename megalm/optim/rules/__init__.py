"""Update rules by their name in the configuration."""

from megalm.optim.rules.adamw import AdamW
from megalm.optim.rules.muon import Muon
from megalm.optim.rules.rule import Rule, Update
from megalm.optim.rules.sgd import SGD
from megalm.optim.rules.whole import WholeMatrixRule

RULES: dict[str, type[Rule]] = {"adamw": AdamW, "sgd": SGD, "muon": Muon}

__all__ = ["RULES", "AdamW", "Muon", "Rule", "SGD", "Update", "WholeMatrixRule"]
