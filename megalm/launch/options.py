"""The words of `python -m megalm.launch` that begin with a dash, which are Hydra's own: help, a look at the configuration,
the search path, several runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megalm.config.errors import ConfigError

HELP = ("-h", "--help", "-help")
SHOW = ("--cfg", "-c")
INFO = ("--info", "-i")
SEVERAL = ("-m", "--multirun")
JOBS = "--jobs"
FIRST_WORDS = ("job", "all", "hydra")
"""What Hydra lets stand behind --cfg. Here there is one configuration, the run's."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for beside its keys and values."""

    words: list[str]
    """All that sets something."""
    help: bool = False
    show: bool = False
    """Print the composed configuration."""
    info: bool = False
    """Print where configurations are looked for."""
    several: bool = False
    """A run for each combination of the values that stand with commas between them."""
    jobs: int = 1
    """Runs at a time."""


def read_options(arguments: Sequence[str]) -> Options:
    """Take a command line apart. Errors: ConfigError for a wrong number of jobs."""
    rest: list[str] = []
    asked: dict[str, bool] = {}
    jobs = 1
    following = iter(arguments)
    for word in following:
        name, equals, value = word.partition("=")
        if word in HELP:
            asked["help"] = True
        elif name in SHOW:
            asked["show"] = True
            if not equals:
                value = next(following, "job")
            if value not in FIRST_WORDS:
                rest.append(value)  # `--cfg +model=tiny`: Hydra's word was left out
        elif name in INFO:
            asked["info"] = True
        elif word in SEVERAL:
            asked["several"] = True
        elif name == JOBS:
            jobs = _count(value if equals else next(following, ""))
        else:
            rest.append(word)
    return Options(rest, jobs=jobs, **asked)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{JOBS} {text}: say how many runs may go on at a time, a whole number from 1 on.")
    return int(text)
