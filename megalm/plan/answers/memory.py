"""Bytes on each GPU, by pipeline stage and part."""

from typing import Any

from megalm.architecture.tensors import count_parameters
from megalm.page.document import Table
from megalm.page.plots import Bars
from megalm.plan.activations import estimate_by_korthikanti, estimate_layer_activations
from megalm.plan.fit import find_nearest_fitting
from megalm.plan.layout import explain_indivisible
from megalm.plan.memory import PARTS, count_guard_snapshots, estimate_layout
from megalm.plan.render import format_gib
from megalm.plan.report import Report
from megalm.plan.request import Request, choose_machine, compose
from megalm.plan.resolve import resolve_layout

HELP = "bytes on each GPU, by pipeline stage and part"
KEYS = ["gpus", "gpu", "seq_length", "batch_tokens", "snapshots"]
EXAMPLE = "megalm plan memory +model=30b gpus=64 gpu=h100 parallel.tensor=8 parallel.recompute=full"


def answer(request: Request) -> Report:
    """The memory of every stage, and whether it fits."""
    config = compose(request)
    machine = choose_machine(request, config)
    layout = resolve_layout(request, config, machine)
    model = config.model
    snapshots = request.whole("snapshots", count_guard_snapshots(config)) or 0
    estimate = estimate_layout(
        model, layout, cpu=machine.is_cpu, bucket_bytes=config.parallel.bucket_mb * 1e6, snapshots=snapshots
    )
    layer = estimate_layer_activations(model, layout, cpu=machine.is_cpu)
    worst = estimate.worst
    warnings = [f"does not divide: {problem}" for problem in explain_indivisible(model, layout)]
    fits = estimate.bytes_per_gpu <= machine.memory
    if not fits:
        remedy = find_nearest_fitting(config, layout, machine)
        warnings.append(
            f"does not fit: {format_gib(estimate.bytes_per_gpu)} needed, {format_gib(machine.memory)} there."
            + (f" It fits with {remedy}." if remedy else " No change of these settings makes it fit.")
        )
    paper = estimate_by_korthikanti(
        model.seq_length,
        layout.micro_batch,
        model.hidden_size,
        model.num_heads,
        layout.tensor,
        layout.sequence,
        layout.recompute,
    )
    data: dict[str, Any] = {
        "model": model.name,
        "parameters": count_parameters(model).total,
        "active_parameters": count_parameters(model).active,
        "gpu": machine.accelerator.name,
        "gpus": layout.world,
        "layout": layout.as_dict(),
        "bytes_per_gpu": round(estimate.bytes_per_gpu),
        "bytes_available_per_gpu": round(machine.memory),
        "fits": fits,
        "host_bytes_per_gpu": round(worst.host_snapshots),
        "worst_stage": worst.stage,
        "parts": {f"{part}_bytes": round(getattr(worst, part)) for part in PARTS},
        "stages": [stage.as_dict() for stage in estimate.stages],
        "activation_bytes_per_layer": {name: round(value) for name, value in layer.saved.items()},
        "activation_bytes_per_layer_korthikanti": paper,
    }
    shown = _shown(estimate.stages)
    headers = ("part (GiB)", *[f"stage {stage.stage}" for stage in shown])
    rows: list[tuple[str, ...]] = [
        (part, *[f"{getattr(stage, part) / 2**30:.2f}" for stage in shown])
        for part in (*PARTS, "total", "host_snapshots")
    ]
    rows = [(row[0].replace("_", " "), *row[1:]) for row in rows]
    rows += [
        ("layers", *[str(stage.layers) for stage in shown]),
        ("chunks in flight", *[str(stage.in_flight) for stage in shown]),
    ]
    return Report(
        f"{model.name}: memory",
        data,
        [
            Table(f"{model.name} on {machine.describe()}", headers, rows, layout.describe()),
            Table(
                "activations of one layer and micro-batch",
                ("kept for backward", "MiB"),
                [(name, f"{value / 2**20:.1f}") for name, value in layer.saved.items()],
                f"together {format_gib(layer.total)}; a 16-bit GPT with dropout and unfused attention would keep"
                f" {format_gib(paper)} (Korthikanti et al. 2022)",
            ),
            Bars(
                "memory by part, a rank of each stage",
                "GiB",
                [(f"stage {stage.stage}", [(part, getattr(stage, part) / 2**30) for part in PARTS]) for stage in shown],
                limit=("memory of a rank (GiB)", machine.memory / 2**30),
            ),
        ],
        warnings,
    )


def _shown(stages: list[Any]) -> list[Any]:
    """Stages that differ, and at most eight of them: the first ones, the last ones, the fullest."""
    if len(stages) <= 8:
        return stages
    fullest = max(stages, key=lambda stage: stage.total)
    return sorted(
        {stage.stage: stage for stage in (*stages[:4], *stages[-3:], fullest)}.values(), key=lambda s: s.stage
    )
