"""Faults on purpose: ranks that die, freeze or hang in a chosen phase, to see a run recover (experiment=chaos/...)."""

from dataclasses import dataclass, field

from megalm.config.errors import ConfigError
from megalm.config.fields import choice, number


@dataclass
class FaultConfig:
    """One fault of one rank. Never set it in a real run."""

    kind: str = choice("kill", "stop", "exception", "exit", "out_of_memory", "hang", "kill_launcher", "lose")
    """What happens. kill: SIGKILL, as from the kernel when memory is short. stop: SIGSTOP, no life is shown. exception: an
    error is raised. exit: the process ends with status 0 before the run does. out_of_memory: an allocation fails. hang: the
    rank waits for ever, and lives. kill_launcher: SIGKILL to who started the ranks. lose: SIGKILL, and whatever is started in
    its place ends so, too, until the run has come to step `until`: a GPU that is gone."""
    phase: str = choice(
        "backward", "start", "join", "load", "data", "forward", "reduce", "update", "save", "evaluate", "end"
    )
    """Where it strikes: the moment that the rank comes to this phase."""
    step: int = number(1, at_least=1)
    """The step under way, or the first after it that comes to the phase; start, join and load are before any step."""
    rank: int = number(0, at_least=0)
    """Which rank; where ranks are missing, the place that this rank had at first."""
    until: int = number(0, at_least=0)
    """lose: the step from which on the place works again; 0: never."""
    attempts: int = number(1, at_least=1)
    """In so many attempts, the first ones of a launcher, it strikes once each; lose: once in the run."""


@dataclass
class ChaosConfig:
    """Faults by step, or by chance."""

    faults: list[FaultConfig] = field(default_factory=list)
    """What strikes."""
    mean_s: float = number(0.0, at_least=0, at_most=31_536_000)
    """0: each fault strikes at its step. Else one of them, by chance, strikes any rank at its phase, in every attempt, after a
    time of which this is the mean (seconds, exponentially distributed); steps, ranks and attempts of the faults do not count."""
    seed: int = number(0, at_least=0)
    """Of chance: which fault, which rank, when."""


def check_chaos(chaos: ChaosConfig, world_size: int) -> None:
    """Errors: ConfigError for a fault that cannot strike in a world of this size."""
    if chaos.mean_s and not chaos.faults:
        raise ConfigError(
            f"resilience.chaos.mean_s={chaos.mean_s:g} without resilience.chaos.faults: name what strikes, for example "
            "resilience.chaos.faults=[{kind: kill}]."
        )
    for place, fault in enumerate(chaos.faults):
        where = f"resilience.chaos.faults[{place}]"
        if fault.rank >= world_size:
            raise ConfigError(
                f"{where}.rank={fault.rank}, but the ranks are 0 to {world_size - 1}: choose one of them."
            )
        if fault.until and (fault.kind != "lose" or fault.until < fault.step):
            raise ConfigError(
                f"{where}.until={fault.until}: for a fault of kind lose, the step from {fault.step} (its own) on at which its "
                "place works again. Leave it out, or choose a later one."
            )
        if fault.phase == "join" and world_size == 1:
            raise ConfigError(
                f"{where}.phase=join, but a single rank joins nobody: choose another phase, or world_size=2."
            )
