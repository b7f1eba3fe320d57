"""A scaling ladder below a model."""

from pathlib import Path
from typing import Any

from megalm.config.cluster import CONF
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.page.plots import Line, Lines
from megalm.plan import cost
from megalm.plan.budget import LAWS
from megalm.plan.ladder import build_ladder, write
from megalm.plan.render import format_dollars
from megalm.plan.report import Report
from megalm.plan.request import Request, choose_machine, compose

HELP = "sizes, tokens and learning rates of a scaling ladder; writes the experiments"
KEYS = ["rungs", "ratio", "gpus", "gpu", "mfu", "price", "price_list", "out"]
EXAMPLE = "megalm plan ladder model=30b rungs=5 out=ladder-30b"


def answer(request: Request) -> Report:
    """Sizes, tokens, learning rates and cost of each rung; writes the experiments."""
    config = compose(request)
    rungs = build_ladder(config.model, request.whole("rungs", 5) or 5, request.number("ratio") or 20.0)
    machine = choose_machine(request, config)
    mfu = request.number("mfu") or 0.4
    peak = machine.peak(config.precision.dtype)
    folder = Path(request.word("out") or CONF / "experiment" / f"ladder-{config.model.name}")
    files = write(rungs, folder)
    inside = folder.resolve().is_relative_to((CONF / "experiment").resolve())
    law = LAWS["besiroglu"]
    rows: list[tuple] = []
    data: list[dict[str, Any]] = []
    for rung, file in zip(rungs, files, strict=True):
        gpu_days = cost.count_training_days(rung.flops, 1, peak, mfu)
        price = gpu_days * 24 * machine.price if machine.price is not None else None
        expected = law.loss(rung.parameters, rung.tokens)
        rows.append(
            (
                rung.name, format_count(rung.parameters), f"{rung.model.num_layers} x {rung.model.hidden_size}",
                format_count(rung.tokens), f"{rung.lr:.2e}", f"{rung.global_batch}", f"{rung.steps:,}",
                format_count(rung.flops), f"{gpu_days:.3g}", format_dollars(price), f"{expected:.3f}",
            )
        )  # fmt: skip
        data.append(
            {
                "name": rung.name, "parameters": rung.parameters, "num_layers": rung.model.num_layers,
                "hidden_size": rung.model.hidden_size, "num_heads": rung.model.num_heads, "tokens": rung.tokens,
                "lr": rung.lr, "global_batch_size": rung.global_batch, "steps": rung.steps, "flops": rung.flops,
                "gpu_days": gpu_days, "dollars": price, "expected_loss_nats": expected, "file": str(file),
            }
        )  # fmt: skip
    headers = (
        "rung", "parameters", "layers x width", "tokens", "learning rate", "batch (sequences)", "steps", "FLOPs", "GPU-days",
        "cost ($)", "loss by published law (nats)",
    )  # fmt: skip
    runs = [f"python -m megalm.launch +experiment={folder.name}/{rung.name}" for rung in rungs[:-1]]
    hint = (
        "run them: " + runs[0] + ", ..."
        if inside
        else f"copy {folder} into conf/experiment to run them with +experiment={folder.name}/{rungs[0].name}"
    )
    return Report(
        f"ladder to {config.model.name}",
        {"model": config.model.name, "gpu": machine.accelerator.name, "mfu": mfu, "rungs": data},
        [
            Table(
                f"ladder to {config.model.name} on {machine.accelerator.description} at {100 * mfu:.0f}% MFU",
                headers,
                rows,
                "learning rates: GPT-3's table (Brown et al. 2020) between its points; the ladder without the target costs"
                f" {100 * sum(r.flops for r in rungs[:-1]) / rungs[-1].flops:.2f}% of the target",
            ),
            f"wrote {len(files)} experiments to {folder}; {hint}",
            f"then: megalm plan fit runs/{config.model.name}-ladder-* parameters={rungs[-1].parameters}"
            f" tokens={rungs[-1].tokens:.4g}",
            Lines("cost of the rungs", "parameters", "GPU-days",
                  [Line("rungs", [(r["parameters"], r["gpu_days"]) for r in data])], log="xy"),
        ],
    )  # fmt: skip
