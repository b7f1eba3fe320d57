"""What the run does by itself when the loss misbehaves."""

from dataclasses import dataclass


@dataclass
class GuardConfig:
    """Detection of loss spikes and non-finite values, and the policy that answers them."""

    enabled: bool = True
    """Refuse updates whose loss or gradients are not finite."""
