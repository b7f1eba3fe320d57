"""Failures, checkpoint interval and spares."""

from megalm.page.document import Table
from megalm.page.plots import Line, Lines
from megalm.plan.goodput import estimate_checkpoint_loss, estimate_goodput
from megalm.plan.render import format_duration
from megalm.plan.report import Report
from megalm.plan.request import Request, choose_failure_rate, choose_machine, compose
from megalm.plan.summary import estimate_checkpoint_stall

HELP = "failures, checkpoint interval, spares: how much of the time trains"
KEYS = [
    "gpus", "gpu", "failures", "observed_failures", "observed_nodes", "observed_days", "gpus_per_node", "mtti",
    "stall", "restart", "repair", "interval", "spares", "days",
]  # fmt: skip
EXAMPLE = "megalm plan goodput gpus=3072 failures=1 stall=60s days=30"


def answer(request: Request) -> Report:
    """What is lost, and the interval and number of spares that lose least."""
    rate, source = choose_failure_rate(request)
    gpus = request.whole("gpus")
    node = request.whole("gpus_per_node", 8) or 8
    stall = request.number("stall")
    if request.has_model:
        from megalm.architecture.tensors import count_parameters
        from megalm.plan.layout import Layout

        config = compose(request)
        machine = choose_machine(request, config)
        gpus = gpus or machine.gpus
        if stall is None:
            layout = Layout(data=machine.gpus, zero_stage=1)
            stall = estimate_checkpoint_stall(count_parameters(config.model).total, layout, machine)
    elif request.word("gpu"):
        node = request.whole("gpus_per_node", choose_machine(request).accelerator.gpus_per_node) or 8
    if gpus is None and "observed_nodes" in request.own:
        gpus = (request.whole("observed_nodes") or 1) * node
    mtti = request.number("mtti")
    result = estimate_goodput(
        gpus or node,
        rate,
        stall=10.0 if stall is None else stall,
        restart=request.number("restart", 600.0) or 0.0,
        repair=request.number("repair", 86400.0) or 0.0,
        interval=request.number("interval"),
        spares=request.whole("spares"),
        gpus_per_node=node,
        days=request.number("days"),
        mtti=mtti,
    )
    data = {**result.as_dict(), "gpu_days_per_failure": 1000.0 / rate if rate else None, "failures_source": source}
    law = "sqrt(2 stall MTTI), Young 1974, Daly 2006"
    away = f"{result.spares} spare nodes, {format_duration(result.repair)} of repair"
    rows = [
        ("failures in 1,000 GPU-days", f"{rate:.3g}", source),
        ("GPU-days per failure", f"{1000.0 / rate:.0f}" if rate else "-", ""),
        (f"time between failures of {result.gpus} GPUs", format_duration(result.mtti), "given" if mtti else ""),
        ("failures a day", f"{86400 / result.mtti:.2f}", ""),
        ("checkpoint every", format_duration(result.interval), law if result.interval_is_best else "given"),
        ("checkpoint stops training for", format_duration(result.stall), ""),
        ("lost to saving and repeated work (%)", f"{100 * result.checkpoint_share:.2f}", "stall/interval + interval/(2 MTTI)"),
        ("lost to starting again (%)", f"{100 * result.restart_share:.2f}", f"{format_duration(result.restart)} each"),
        ("lost to waiting for nodes (%)", f"{100 * result.waiting_share:.2f}", away),
        ("effective training time (%)", f"{100 * result.effective:.2f}", ""),
        ("spare nodes that pay", str(result.best_spares), "least cost of a useful hour"),
    ]  # fmt: skip
    if result.expected_failures is not None:
        rows.append(
            ("failures in this run", f"{result.expected_failures:.1f}", f"{request.number('days'):g} days of training")
        )
    spares = [
        (int(row["spare_nodes"]), f"{row['waiting_percent']:.2f}", f"{100 * (row['relative_cost'] - 1):+.2f}")
        for row in result.spare_table[:12]
    ]
    blocks: list = [
        Table("failures and goodput", ("", "", "how"), rows),
        Table("spares", ("spare nodes", "time waiting (%)", "cost of a useful hour (%)"), spares),
    ]
    if result.mtti != float("inf") and result.stall > 0:
        best = (2 * result.stall * result.mtti) ** 0.5
        line = [
            (
                best / 60 * 10 ** (i / 10),
                100 * estimate_checkpoint_loss(best * 10 ** (i / 10), result.stall, result.mtti),
            )
            for i in range(-12, 13)
        ]
        chosen = ("chosen", result.interval / 60, 100 * result.checkpoint_share)
        blocks.append(
            Lines(
                "time lost against the checkpoint interval",
                "interval (minutes)",
                "lost (%)",
                [Line("saving + repeating", line)],
                log="xy",
                dots=[chosen],
            )
        )
    return Report("goodput", data, blocks)
