"""What the run does when a process dies or hangs."""

from dataclasses import dataclass


@dataclass
class ResilienceConfig:
    """Restarts of local ranks by torch elastic, and the limit on waiting for each other."""

    max_restarts: int = 0
    """How often dead local ranks are started again before the run gives up."""
    timeout_minutes: float = 30.0
    """How long a collective may take before it counts as hung."""
