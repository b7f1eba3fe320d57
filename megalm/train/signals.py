"""What a step measured before its update."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Signals:
    """What a step measured before its update, the same on every rank: one host synchronisation a step."""

    loss: float
    """Mean loss over the tokens of the global batch, nats."""
    grad_norm: float
    """L2 norm of the whole gradient, before clipping."""
    nonfinite: float
    """Gradient values that are NaN or infinite."""
    update_rms: float | None = None
    """Largest root mean square, over the tensors, of what the update would change their elements by; on a sample of each.
    None where it is not measured (guard=off)."""
    attention_logit: float | None = None
    """Largest attention logit, over a sample of the queries of every sequence, layer and head."""
    loss_spread: float | None = None
    """Largest mean loss of a data rank less their median, nats; None with one data rank."""
    judged: bool = True
    """Whether the loss' height tells how the run does: a policy's surrogate is near 0 however well it learns."""
    worst_rank: int = -1
    """Data rank whose mean loss is largest; -1 where they are not told apart."""
