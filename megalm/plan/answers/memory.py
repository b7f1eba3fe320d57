"""Bytes on each GPU, by pipeline stage and part."""

from typing import Any

from megalm.architecture.tensors import parameters
from megalm.page.document import Table
from megalm.page.plots import Bars
from megalm.plan.activations import korthikanti, layer_activations
from megalm.plan.fit import nearest_fitting
from megalm.plan.layout import divisibility
from megalm.plan.memory import PARTS, estimate_layout, guard_snapshots
from megalm.plan.render import gib
from megalm.plan.report import Report
from megalm.plan.request import Request, compose, machine
from megalm.plan.resolve import resolve_layout

HELP = "bytes on each GPU, by pipeline stage and part"
KEYS = ["gpus", "gpu", "seq_length", "batch_tokens", "snapshots"]
EXAMPLE = "megalm plan memory +model=30b gpus=64 gpu=h100 parallel.tensor=8 parallel.recompute=full"


def answer(request: Request) -> Report:
    """The memory of every stage, and whether it fits."""
    config = compose(request)
    found = machine(request, config)
    layout = resolve_layout(request, config, found)
    model = config.model
    snapshots = request.whole("snapshots", guard_snapshots(config)) or 0
    estimate = estimate_layout(
        model, layout, cpu=found.is_cpu, bucket_bytes=config.parallel.bucket_mb * 1e6, snapshots=snapshots
    )
    layer = layer_activations(model, layout, cpu=found.is_cpu)
    worst = estimate.worst
    warnings = [f"does not divide: {problem}" for problem in divisibility(model, layout)]
    fits = estimate.bytes_per_gpu <= found.memory
    if not fits:
        remedy = nearest_fitting(config, layout, found)
        warnings.append(
            f"does not fit: {gib(estimate.bytes_per_gpu)} needed, {gib(found.memory)} there."
            + (f" It fits with {remedy}." if remedy else " No change of these settings makes it fit.")
        )
    paper = korthikanti(
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
        "parameters": parameters(model).total,
        "active_parameters": parameters(model).active,
        "gpu": found.accelerator.name,
        "gpus": layout.world,
        "layout": layout.as_dict(),
        "bytes_per_gpu": round(estimate.bytes_per_gpu),
        "bytes_available_per_gpu": round(found.memory),
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
            Table(f"{model.name} on {found.describe()}", headers, rows, layout.describe()),
            Table(
                "activations of one layer and micro-batch",
                ("kept for backward", "MiB"),
                [(name, f"{value / 2**20:.1f}") for name, value in layer.saved.items()],
                f"together {gib(layer.total)}; a 16-bit GPT with dropout and unfused attention would keep {gib(paper)}"
                " (Korthikanti et al. 2022)",
            ),
            Bars(
                "memory by part, a rank of each stage",
                "GiB",
                [(f"stage {stage.stage}", [(part, getattr(stage, part) / 2**30) for part in PARTS]) for stage in shown],
                limit=("memory of a rank (GiB)", found.memory / 2**30),
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
