"""Dollars of pretraining, fine-tuning, people's data and storage."""

from typing import Any

from megalm.architecture.tensors import count_parameters
from megalm.config import ConfigError
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.plan import cost
from megalm.plan.render import format_dollars
from megalm.plan.report import Report
from megalm.plan.request import Request, choose_machine, compose, require_positive

HELP = "dollars of GPUs, of people's data and of storage"
KEYS = [
    "tokens", "finetune_tokens", "parameters", "gpus", "gpu", "peak", "dtype", "mfu", "convention", "price",
    "price_list", "days", "hours", "batch_tokens", "seq_length", "instruction_pairs", "comparisons",
    "multi_turn_chats", "annotation_hours", "checkpoints", "storage_days",
]  # fmt: skip
EXAMPLE = "megalm plan cost tokens=1e12 gpus=440 gpu=a100-40gb days=9.5 parameters=6.65e9"

PEOPLE = {
    "instruction_pairs": "instruction_pair",
    "comparisons": "comparison",
    "multi_turn_chats": "multi_turn_chat",
    "annotation_hours": "annotation_hour",
}


def answer(request: Request) -> Report:
    """One bill: GPU time (given, or worked out from FLOPs), people's data, checkpoints."""
    data: dict[str, Any] = {}
    rows: list[tuple[str, str, str, str]] = []
    total = 0.0
    size = _size(request)
    people = {kind: request.number(key) or 0.0 for key, kind in PEOPLE.items() if key in request.own}
    asks_gpus = request.has_model or any(
        key in request.own for key in ("days", "hours", "gpu", "gpus", "tokens", "mfu")
    )
    blocks: list[Any] = []
    if asks_gpus:
        total += _gpu_time(request, size, data, rows, blocks)
    if people:
        prices = {PEOPLE[key]: None for key in PEOPLE}
        bill = cost.price_human_data(people)
        if request.number("price") is not None and not asks_gpus and len(bill) == 1:
            entry = next(iter(bill.values()))
            entry["dollars_each"] = request.number("price")
            entry["dollars"] = entry["count"] * entry["dollars_each"]
        assert set(bill) <= set(prices)
        for kind, entry in bill.items():
            name = kind.replace("_", " ") + "s"
            rows.append(
                (
                    name,
                    f"{entry['count']:,.0f} x ${entry['dollars_each']:g}",
                    format_dollars(entry["dollars"]),
                    entry["source"],
                )
            )
            total += entry["dollars"]
        data["human_data"] = bill
        data["human_data_dollars"] = sum(entry["dollars"] for entry in bill.values())
    if "checkpoints" in request.own or "storage_days" in request.own:
        if size is None:
            raise ConfigError("checkpoints need a size: add +model=7b or parameters=7e9.")
        kept = request.whole("checkpoints", 10) or 0
        stored = cost.price_checkpoint_storage(int(size), kept, request.number("storage_days", 365.0) or 365.0)
        rows.append(
            (
                "checkpoints in object storage",
                f"{kept} x {stored.checkpoint_bytes / 1e9:,.1f} GB for {stored.months:.1f} months",
                format_dollars(stored.dollars),
                stored.source,
            )
        )
        data.update(checkpoint_bytes=stored.checkpoint_bytes, checkpoints=kept, storage_dollars=stored.dollars)
        total += stored.dollars
    if not rows:
        raise ConfigError(
            "nothing to price: give GPUs (gpus=440 gpu=a100-40gb days=9.5, or +model=7b tokens=1e12 with mfu=0.45),"
            " people's data (instruction_pairs=27540 comparisons=1e6) or storage (+model=7b checkpoints=10)."
        )
    data["dollars"] = total
    rows.append(("together", "", format_dollars(total), ""))
    table = Table("cost", ("what", "how much", "cost ($)", "source"), rows)
    return Report("cost", data, [table, *blocks])


def _size(request: Request) -> float | None:
    if request.has_model:
        return float(count_parameters(compose(request).model).total)
    return request.number("parameters")


def _gpu_time(request: Request, size: float | None, data: dict[str, Any], rows: list, blocks: list) -> float:
    days = request.number("days")
    if days is None and request.number("hours"):
        days = (request.number("hours") or 0.0) / 24.0
    tokens = request.number("tokens") or request.number("finetune_tokens")
    kind = "fine-tuning" if request.number("finetune_tokens") else "GPU time"
    if days is None:
        from megalm.plan.answers import time

        if request.number("finetune_tokens"):
            request.own["tokens"] = request.number("finetune_tokens")
        timed = time.answer(request).data
        if timed["dollars"] is None:
            raise ConfigError("no price is known for this machine: add price=2.5 (dollars a GPU-hour).")
        data.update(timed)
        rows.append(
            (
                kind,
                f"{timed['gpus']} GPUs x {timed['days']:.2f} days x ${timed['dollars_per_gpu_hour']:.2f} a GPU-hour",
                format_dollars(timed["dollars"]),
                str(timed.get("price_source") or ""),
            )
        )
        data["gpu_dollars"] = timed["dollars"]
        if request.has_model:
            config = compose(request)
            machine = choose_machine(request, config)
            blocks.append(
                cost.draw_cost_by_size(
                    config.model, machine, timed["peak_flops_per_second_per_gpu"], max(timed["mfu"], 1e-6)
                )
            )
        return float(timed["dollars"])
    if "gpus" not in request.own:
        raise ConfigError("how many GPUs? Add gpus=64.")
    gpus = request.whole("gpus") or 1
    price, source, peak = request.number("price"), "given", request.number("peak")
    if request.word("gpu"):
        machine = choose_machine(request)
        price, source = machine.price, machine.price_source
        peak = peak or machine.peak(request.word("dtype") or ("fp32" if machine.is_cpu else "bf16"))
    if price is None:
        raise ConfigError("no price: add price=2.5 (dollars a GPU-hour), or gpu=h100 for conf/prices.yaml's.")
    bill = cost.price_gpus(gpus, require_positive("days", days), price)
    data.update(
        gpus=gpus, gpu=request.word("gpu"), days=days, hours=24 * days, gpu_days=gpus * days, gpu_hours=24 * gpus * days,
        dollars_per_gpu_hour=price, price_source=source, gpu_dollars=bill,
    )  # fmt: skip
    rows.append((kind, f"{gpus} GPUs x {days:.2f} days x ${price:.2f} a GPU-hour", format_dollars(bill), source))
    if tokens:
        data["tokens"] = tokens
        data["dollars_per_million_tokens"] = bill / tokens * 1e6
        if size and peak:
            used = 6.0 * size * tokens / (gpus * days * 86400.0 * peak)
            data["utilisation_6nd"] = used
            rows.append(("utilisation that implies", f"{100 * used:.1f}% of {format_count(peak)}FLOP/s", "", "6 N D"))
    return bill
