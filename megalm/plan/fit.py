"""Refusing what cannot fit or cannot divide, with the nearest thing that works."""

from dataclasses import replace

from megalm.config import Config, ConfigError
from megalm.plan.layout import Layout, explain_indivisible, read_layout
from megalm.plan.machine import Machine
from megalm.plan.memory import PARTS, MemoryEstimate, count_guard_snapshots, estimate_layout
from megalm.plan.models import find_largest_fitting


def check_fits(config: Config, machine: Machine) -> MemoryEstimate:
    """The memory of a configuration on a machine; ConfigError when it cannot divide or does not fit.

    The message has the figures, the nearest layout of the same model that fits, and the largest model that would.
    """
    layout = read_layout(config, machine.gpus)
    problems = explain_indivisible(config.model, layout, uneven=True)
    if problems:
        raise ConfigError("this layout cannot be dealt out: " + "; ".join(problems) + ".")
    estimate = estimate_layout(
        config.model,
        layout,
        cpu=machine.is_cpu,
        bucket_bytes=config.parallel.bucket_mb * 1e6,
        snapshots=count_guard_snapshots(config),
    )
    if estimate.bytes_per_gpu <= machine.memory:
        return estimate
    worst = estimate.worst
    parts = sorted(((getattr(worst, part), part) for part in PARTS), reverse=True)[:3]
    names = {"snapshots": "the guard's snapshots", "saving": "the copy that a save writes"}
    figures = ", ".join(f"{names.get(part, part)} {format_gib(value)}" for value, part in parts)
    remedy = find_nearest_fitting(config, layout, machine)
    largest = find_largest_fitting(machine, config.precision.dtype)
    advice = (
        f"It fits with {remedy}."
        if remedy
        else f"No setting of recompute, micro-batch or sharding makes it fit {machine.describe()}."
    )
    raise ConfigError(
        f"model {config.model.name} needs {format_gib(estimate.bytes_per_gpu)} on each rank ({figures}),"
        f" and a rank has {format_gib(machine.memory)}. {advice}"
        + (f" The largest model of conf/model that fits this machine is {largest}." if largest else "")
    )


def find_nearest_fitting(config: Config, layout: Layout, machine: Machine) -> str | None:
    """Find the first, mildest change of settings that makes a layout fit, as command-line overrides; None: none does."""
    kept = count_guard_snapshots(config)
    choices: list[tuple[int, list[str]]] = [(kept, [])]
    if machine.is_cpu and kept > 1:  # where ranks and snapshots share the memory
        choices.append((1, ["guard.snapshot_lags=[16]"]))
    if machine.is_cpu and kept:
        choices.append((0, ["guard.snapshot_lags=[]"]))
    for snapshots, fewer in choices:
        for changes, words in [({}, []), *_remedies(layout, machine)]:
            candidate = replace(layout, **changes)
            if candidate.world != machine.gpus or explain_indivisible(config.model, candidate):
                continue
            estimate = estimate_layout(config.model, candidate, cpu=machine.is_cpu, snapshots=snapshots)
            if estimate.bytes_per_gpu <= machine.memory:
                return " ".join([*words, *fewer])
    return None


def _remedies(layout: Layout, machine: Machine):
    small = {"micro_batch": 1}
    words_small = ["train.micro_batch_size=1"]
    for batch in _halvings(layout.micro_batch):
        yield {"micro_batch": batch}, [f"train.micro_batch_size={batch}"]
    steps: list[tuple[dict, list[str]]] = []
    for recompute in ("selective", "full"):
        steps.append(({"recompute": recompute}, [f"parallel.recompute={recompute}"]))
        steps.append(({"recompute": recompute, **small}, [f"parallel.recompute={recompute}", *words_small]))
    yield from steps
    if layout.data > 1:
        for stage in (1, 2):
            for changes, words in [({}, []), *steps]:
                yield {"zero_stage": stage, **changes}, [f"parallel.zero_stage={stage}", *words]
    ranks = machine.gpus
    for tensor in (2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16, 32, 64):
            if ranks % (tensor * pipeline) or tensor > machine.accelerator.gpus_per_node or machine.is_cpu:
                continue
            axes = {
                "tensor": tensor, "pipeline": pipeline, "data": ranks // tensor // pipeline, "sequence": True, "context": 1,
                "virtual": 1, "schedule": "1f1b", "zero_stage": 1,
            }  # fmt: skip
            for changes, words in (
                ({**small}, words_small),
                ({"recompute": "full", **small}, ["parallel.recompute=full", *words_small]),
            ):
                named = [
                    f"parallel.tensor={tensor}",
                    f"parallel.pipeline={pipeline}",
                    "parallel.sequence=true",
                    "parallel.zero_stage=1",
                ]
                yield {**axes, **changes}, [*named, *words]


def _halvings(batch: int):
    while batch > 1:
        batch //= 2
        yield batch


def format_gib(value: float) -> str:
    """Bytes as GiB, or MiB when small."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
