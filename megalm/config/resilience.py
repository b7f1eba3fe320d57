"""What the run does when a process dies or hangs."""

from dataclasses import dataclass

from megalm.config.fields import number


@dataclass
class ResilienceConfig:
    """Restarts of local ranks by torch elastic, and the limit on waiting for each other."""

    max_restarts: int = number(0, at_least=0)
    """How often dead local ranks are started again before the run gives up."""
    timeout_minutes: float = number(30.0, above=0, at_most=525_600)
    """How long a collective may take before it counts as hung."""
