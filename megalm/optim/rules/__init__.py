"""Update rules by their name in the configuration."""

from megalm.optim.rules.adamw import AdamW
from megalm.optim.rules.rule import Rule, Update
from megalm.optim.rules.sgd import SGD

RULES: dict[str, type[Rule]] = {"adamw": AdamW, "sgd": SGD}

__all__ = ["RULES", "AdamW", "Rule", "SGD", "Update"]
