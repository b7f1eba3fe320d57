"""What the run does when a process dies, freezes or hangs."""

from dataclasses import dataclass, field

from megalm.config.chaos import ChaosConfig
from megalm.config.fields import number


@dataclass
class ResilienceConfig:
    """Restarts of the ranks of this machine, and how long anybody waits for anybody."""

    max_restarts: int = number(3, at_least=0)
    """How often the ranks are started again without a new durable step in between; a checkpoint gives all of them back."""
    min_ranks: int = number(0, at_least=0)
    """Fewest ranks to go on with where one does not come back: on as many as are left and the layout allows, with the global
    batch as it was. 0: only with all of them. The run grows again at a save, once the place works or a spare is there."""
    spares: int = number(0, at_least=0)
    """Places of this machine, GPUs beside those of world_size, that take over from one that does not come back."""
    hang_timeout_s: float = number(0.0, at_least=0, at_most=31_536_000)
    """Seconds without progress after which the ranks count as hanging; 0: learned, from how long each phase took so far."""
    grace_s: float = number(30.0, above=0, at_most=86_400)
    """From the first signal to the end: how long the ranks may take to save. A scheduler must give as much before it kills."""
    timeout_minutes: float = number(30.0, above=0, at_most=525_600)
    """How long a collective may take before it counts as hung: the last line, where nobody watches from outside."""
    chaos: ChaosConfig = field(default_factory=ChaosConfig)
    """Faults on purpose."""
