"""The layout that a request means: the one given, or the best one found."""

from megalm.config import Config, ConfigError
from megalm.plan.layout import Layout, read_layout
from megalm.plan.machine import Machine
from megalm.plan.request import Request


def resolve_layout(request: Request, config: Config, machine: Machine) -> Layout:
    """Choose the layout that a request means.

    It is the one given by parallel.* overrides; on GPUs without any, or with parallel=auto, the fastest that fits.
    """
    given = request.gives("parallel.") or (request.gives("parallel=") and not request.wants_search)
    given = given or request.gives("train.micro_batch_size")
    if not request.wants_search and (given or machine.is_cpu):
        return read_layout(config, machine.gpus)
    from megalm.plan.search import list_fixed, search

    result = search(config, machine, top=1, fixed=list_fixed(request.overrides, config))
    if not result.best:
        raise ConfigError(result.why_none())
    return result.best[0].layout
