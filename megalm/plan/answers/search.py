"""The ranking of layouts as tables."""

from megalm.architecture import flops
from megalm.architecture.tensors import count_parameters
from megalm.config import Config, ConfigError
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.page.plots import Bars
from megalm.plan.machine import Machine
from megalm.plan.render import format_duration, format_gib
from megalm.plan.report import Report
from megalm.plan.request import Request, choose_machine, compose
from megalm.plan.search import Candidate, list_fixed, search
from megalm.plan.time import PARTS

HELP = "every valid layout, pruned by memory, ranked by time"
KEYS = ["gpus", "gpu", "batch_tokens", "seq_length", "price", "price_list", "tokens", "top", "micro_batch"]
EXAMPLE = "megalm plan search model=30b gpus=512 gpu=h100 batch_tokens=4M"


def answer(request: Request) -> Report:
    """Every valid layout ranked, the top ones and the obvious alternatives with their reasons."""
    config = compose(request)
    machine = choose_machine(request, config)
    top = request.whole("top", 10) or 10
    result = search(
        config, machine, top=top, micro_batch=request.whole("micro_batch"), fixed=list_fixed(request.overrides, config)
    )
    if not result.best:
        raise ConfigError(result.why_none())
    best = result.best[0]
    tokens = config.train.global_batch_size * config.model.seq_length
    data = {
        "model": config.model.name,
        "parameters": count_parameters(config.model).total,
        "gpu": machine.accelerator.name,
        "gpus": machine.gpus,
        "global_batch_size": config.train.global_batch_size,
        "tokens_per_step": tokens,
        "layouts_considered": result.considered + result.dominated,
        "layouts_too_large": result.too_large,
        "layouts_dominated": result.dominated,
        "step_seconds": best.seconds,
        "tokens_per_second": tokens / best.seconds,
        "mfu": compute_mfu(config, machine, best),
        "bytes_per_gpu": round(best.memory.bytes_per_gpu),
        "overrides": best.layout.overrides(),
        "best": [{**c.as_dict(), "mfu": compute_mfu(config, machine, c)} for c in result.best],
        "alternatives": [c.as_dict() for c in result.alternatives],
    }
    headers = ("rank", "layout", "step (s)", "MFU (%)", "memory (GiB)", "why")
    rows = [(rank, *_cells(config, machine, c)) for rank, c in enumerate(result.best, 1)]
    others = [(c.name, *_cells(config, machine, c)[1:]) for c in result.alternatives]
    return Report(
        f"{config.model.name} on {machine.describe()}: layouts",
        data,
        [
            Table(
                f"{config.model.name}, {format_count(tokens)} tokens a step, on {machine.describe()}",
                headers,
                rows,
                f"{result.considered + result.dominated:,} layouts: {result.too_large:,} too large for"
                f" {format_gib(machine.memory)}, {result.dominated:,} dominated by one that fits without more recompute or"
                " sharding",
            ),
            Table("the obvious alternatives", ("instead", *headers[2:]), others),
            "use it: " + " ".join(best.layout.overrides()),
            Bars(
                "time by part",
                "s",
                [(f"{i}", [(part, getattr(c.time, part)) for part in PARTS]) for i, c in enumerate(result.best, 1)]
                + [(c.name[:26], [(part, getattr(c.time, part)) for part in PARTS]) for c in result.alternatives],
            ),
            f"one step takes {format_duration(best.seconds)}: {format_count(tokens / best.seconds)} tokens a second",
        ],
    )


def compute_mfu(config: Config, machine: Machine, candidate: Candidate) -> float:
    """Model FLOPs utilisation of a candidate, 0..1."""
    tokens = config.train.global_batch_size * config.model.seq_length
    rate = tokens / candidate.seconds
    return flops.compute_utilisation(
        flops.count_flops_per_token(config.model), rate, machine.gpus, machine.peak(config.precision.dtype)
    )


def _cells(config: Config, machine: Machine, c: Candidate) -> tuple[str, ...]:
    return (
        c.layout.describe(),
        f"{c.seconds:.3f}",
        f"{100 * compute_mfu(config, machine, c):.1f}",
        f"{c.memory.bytes_per_gpu / 2**30:.1f}",
        c.reason,
    )
