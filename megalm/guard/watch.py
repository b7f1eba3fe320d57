"""What the guard watches beside the loss: attention logits that grow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megalm.config.guard import GuardConfig
from megalm.guard.advice import list_advice
from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class AttentionWatch:
    """Warns, once at each doubling, of attention logits that grow as they do long before a run diverges."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.warned_at = 0.0
        """Largest attention logit that was warned of."""

    def look(self, trainer: Trainer, step: int, signals: Signals) -> None:
        """Write the event `warning` where a logit is beyond guard.attention_warning, and twice what was told before."""
        limit, logit = self.config.attention_warning, signals.attention_logit
        if not limit or logit is None or not max(limit, 2 * self.warned_at) <= logit < math.inf:
            return
        self.warned_at = logit
        hints = [hint for hint in list_advice(trainer.config) if "attention" in hint]
        text = f"attention logits reach {logit:.0f}, as they do long before a run diverges"
        if hints:
            text += f"; what keeps them down in a new run: {' or '.join(hint.partition(':')[0] for hint in hints)}"
        trainer.events.write(
            "warning", step=step, what="attention_logit", attention_logit=logit, text=text, advice=hints
        )
