"""The plan of a run on one screen of a terminal."""

from typing import Any

from megalm.page.axis import format_count
from megalm.plan.render import format_dollars, format_duration, format_gib
from megalm.plan.summary import Plan, list_time_shares


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """(question, answer) lines of the one-screen plan."""
    layout, memory, time = plan.layout, plan.memory, plan.time
    counts, losses = plan.counts, plan.losses
    tokens = plan.tokens
    active = f", {format_count(counts.active)} active" if counts.active != counts.total else ""
    rows = [
        ("what", f"{plan.name}: {counts.total:,} parameters{active} ({format_count(counts.embedding)} in embeddings)"),
        ("where", plan.machine.describe()),
        ("layout", layout.describe()),
        (
            "batch",
            f"{layout.global_batch} x {plan.seq_length} = {format_count(plan.tokens_per_step)} tokens a step"
            + (
                f"; {plan.steps:,} steps = {format_count(tokens)} tokens ({tokens / counts.active:.1f} a parameter)"
                if tokens
                else ""
            ),
        ),
        (
            "FLOPs",
            f"{format_count(plan.flops_per_token)} a token (forward + backward, causal attention),"
            f" {format_count(plan.flops_per_token * plan.tokens_per_step)} a step",
        ),
        (
            "memory",
            f"{format_gib(memory.bytes_per_gpu)} of {format_gib(plan.machine.memory)} a rank: {_memory_words(memory.worst)}",
        ),
        ("step", f"{format_duration(time.total)}: {_time_words(plan)}"),
        (
            "speed",
            f"{plan.tokens_per_second:,.0f} tokens/s, MFU {100 * plan.mfu:.1f}%, HFU {100 * plan.hfu:.1f}%"
            f" of {plan.peak / 1e12:,.3g} TFLOP/s a rank",
        ),
    ]
    if plan.days is not None:
        rows.append(
            (
                "how long",
                format_duration(plan.days * 86400)
                + (
                    f" with failures ({format_duration(plan.training_seconds)} of training)"
                    if losses.effective < 0.999
                    else ""
                ),
            )
        )
    if plan.dollars is not None:
        rows.append(
            (
                "how much",
                f"{format_dollars(plan.dollars)} at ${plan.machine.price:.2f} a GPU-hour; {plan.machine.price_source}",
            )
        )
    if losses.mtti != float("inf"):
        expected = "" if plan.days is None else f", about {plan.days * 86400 / losses.mtti:.1f} in this run"
        rows.append(
            (
                "failures",
                f"one in {format_duration(losses.mtti)}{expected}; save every {format_duration(losses.interval)}"
                f" (Young-Daly), {100 * losses.effective:.1f}% of the time trains",
            )
        )
    rows.append(("checkpoint", f"{format_gib(plan.as_dict()['checkpoint_bytes'])} each (weights and optimizer, fp32)"))
    return rows


def _memory_words(stage: Any) -> str:
    from megalm.plan.memory import PARTS

    parts = sorted(((getattr(stage, part), part) for part in PARTS), reverse=True)
    return ", ".join(f"{part} {format_gib(value)}" for value, part in parts[:4] if value > 0)


def _time_words(plan: Plan) -> str:
    return ", ".join(f"{part.replace('_', ' ')} {100 * share:.0f}%" for part, share in list_time_shares(plan.time)[:4])


def plan_screen(plan: Plan) -> Any:
    """The plan as a rich table."""
    from rich import box
    from rich.table import Table

    table = Table(title="plan", box=box.SIMPLE_HEAVY, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for question, answer in plan_rows(plan):
        table.add_row(question, answer)
    return table
