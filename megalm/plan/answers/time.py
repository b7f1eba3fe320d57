"""Seconds of a step and days of a run: by a given utilisation, or by the roofline of the best layout."""

from typing import Any

from megalm.architecture import flops
from megalm.architecture.tensors import count_parameters
from megalm.config import Config, ConfigError
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.page.plots import Bars
from megalm.plan import cost
from megalm.plan.answers.flops import check_convention, count_hardware_flops
from megalm.plan.layout import explain_indivisible
from megalm.plan.machine import Machine
from megalm.plan.render import format_dollars, format_duration
from megalm.plan.report import Report
from megalm.plan.request import Request, choose_machine, compose
from megalm.plan.resolve import resolve_layout
from megalm.plan.time import PARTS, estimate_step_time

HELP = "seconds of a step and days of a run"
KEYS = [
    "tokens", "parameters", "gpus", "gpu", "peak", "dtype", "mfu", "convention", "price", "price_list",
    "batch_tokens", "seq_length",
]  # fmt: skip
EXAMPLE = "megalm plan time +model=7b tokens=140e9 gpus=64 gpu=a100-40gb mfu=0.507 --json"


def answer(request: Request) -> Report:
    """Days from FLOPs over sustained FLOP/s; the step's parts when they are predicted."""
    if not request.has_model:
        return _by_parameters(request)
    config = compose(request)
    machine = choose_machine(request, config)
    return (
        _by_utilisation(request, config, machine) if request.number("mfu") else _by_roofline(request, config, machine)
    )


def find_peak(request: Request, machine: Machine, dtype: str) -> float:
    """Peak FLOP/s of one GPU that utilisation is counted against."""
    return request.number("peak") or machine.peak(request.word("dtype") or dtype)


def _by_parameters(request: Request) -> Report:
    """A model that is only a number: 6 N D FLOPs."""
    size = request.number("parameters")
    if size is None:
        raise ConfigError("no model: add +model=7b (megalm plan shape lists the models), or parameters=7e9.")
    tokens = request.number("tokens") or 20 * size
    if "gpu" not in request.own and "peak" not in request.own:
        raise ConfigError("which GPU? Add gpu=h100 (or peak=312e12, FLOP/s of one GPU).")
    peak, machine = _peak_and_machine(request)
    mfu = request.number("mfu") or 1.0
    total = 6.0 * size * tokens
    data = _sums(request, total, machine.gpus if machine else request.whole("gpus", 1) or 1, peak, mfu, tokens, machine)
    data = {
        "parameters": size, "active_parameters": size, "tokens": tokens, "tokens_per_parameter": tokens / size,
        "convention": "6nd", "flops_per_token": 6.0 * size, **data,
    }  # fmt: skip
    note = "" if request.number("mfu") else " (no mfu given: the peak itself, a lower bound)"
    return Report(
        "training time", data, [_table(data, f"{format_count(size)} parameters, {format_count(tokens)} tokens{note}")]
    )


def _peak_and_machine(request: Request) -> tuple[float, Machine | None]:
    if request.word("gpu"):
        machine = choose_machine(request)
        return find_peak(request, machine, "fp32" if machine.is_cpu else "bf16"), machine
    return request.number("peak") or 0.0, None


def _by_utilisation(request: Request, config: Config, machine: Machine) -> Report:
    """A given utilisation: FLOPs by the chosen convention over GPUs x peak x MFU."""
    model = config.model
    counts = count_parameters(model)
    convention = check_convention(request.word("convention"))
    tokens = request.number("tokens") or config.train.tokens or 20.0 * counts.active
    if config.train.steps and not request.number("tokens"):
        tokens = float(config.train.steps * config.train.global_batch_size * model.seq_length)
    mfu = request.number("mfu") or 1.0
    peak = find_peak(request, machine, config.precision.dtype)
    each = {name: flops.count_flops_by_definition(model, name) for name in flops.DEFINITIONS}
    data = _sums(request, each[convention] * tokens, machine.gpus, peak, mfu, tokens, machine)
    per_step = config.train.global_batch_size * model.seq_length
    hardware = flops.count_hardware_flops_per_token(
        model, recompute=config.parallel.recompute, causal=convention != "full"
    )
    data = {
        "model": model.name, "parameters": counts.total, "active_parameters": counts.active,
        "seq_length": model.seq_length, "tokens": tokens, "tokens_per_parameter": tokens / counts.active,
        "convention": convention, "flops_per_token": each[convention], "tokens_per_step": per_step,
        "steps": round(tokens / per_step), "model_flops_per_step": each[convention] * per_step,
        "hardware_flops_per_step": hardware * per_step, **data,
        "step_seconds": per_step / data["tokens_per_second"],
        **{f"days_{name}": cost.count_training_days(value * tokens, machine.gpus, peak, mfu) for name, value in each.items()},
    }  # fmt: skip
    rows = [
        (
            name,
            format_count(each[name], 4),
            f"{data[f'days_{name}']:.2f}",
            format_dollars(_money(machine, data[f"days_{name}"])),
            words,
        )
        for name, words in flops.DEFINITIONS.items()
    ]
    return Report(
        f"{model.name}: training time",
        data,
        [
            _table(data, f"{model.name}, {format_count(tokens)} tokens on {machine.describe()}"),
            Table(
                "the same utilisation by other conventions",
                ("MFU counted as", "FLOPs a token", "days", "cost ($)", "what is counted"),
                rows,
                flops.MFU,
            ),
            cost.draw_cost_by_size(config.model, machine, peak, mfu),
        ],
    )


def _by_roofline(request: Request, config: Config, machine: Machine) -> Report:
    """The step's time from the kernels, the links and the pipeline."""
    layout = resolve_layout(request, config, machine)
    problems = explain_indivisible(config.model, layout)
    if problems:
        raise ConfigError("this layout cannot be dealt evenly: " + "; ".join(problems) + ".")
    model = config.model
    seconds = estimate_step_time(model, layout, machine)
    counts = count_parameters(model)
    per_step = layout.global_batch * model.seq_length
    tokens = request.number("tokens") or config.train.tokens
    if tokens is None:
        tokens = float(config.train.steps * per_step) if config.train.steps else 20.0 * counts.active
    convention = check_convention(request.word("convention"))
    peak = find_peak(request, machine, layout.dtype)
    rate = per_step / seconds.total
    each = flops.count_flops_by_definition(model, convention)
    hardware = count_hardware_flops(model, convention, layout.recompute)
    days = tokens / rate / 86400.0
    data: dict[str, Any] = {
        "model": model.name, "parameters": counts.total, "active_parameters": counts.active,
        "seq_length": model.seq_length, "global_batch_size": layout.global_batch, "tokens_per_step": per_step,
        "tokens": tokens, "tokens_per_parameter": tokens / counts.active, "steps": round(tokens / per_step),
        "gpus": layout.world, "gpu": machine.accelerator.name, "peak_flops_per_second_per_gpu": peak,
        "layout": layout.as_dict(), "overrides": layout.overrides(), "convention": convention,
        "flops_per_token": each, "model_flops_per_step": each * per_step, "hardware_flops_per_step": hardware * per_step,
        **seconds.as_dict(), "tokens_per_second": rate, "tokens_per_second_per_gpu": rate / layout.world,
        "mfu": flops.compute_utilisation(each, rate, layout.world, peak),
        "hfu": flops.compute_utilisation(hardware, rate, layout.world, peak),
        "days": days, "hours": 24 * days, "gpu_days": days * layout.world,
        "days_at_peak": cost.count_training_days(each * tokens, layout.world, peak), "dollars": _money(machine, days),
        "dollars_per_gpu_hour": machine.price,
    }  # fmt: skip
    rows = [
        (
            part.replace("_", " "),
            f"{1e3 * getattr(seconds, part):.2f}",
            f"{100 * getattr(seconds, part) / seconds.total:.1f}",
        )
        for part in sorted(PARTS, key=lambda name: -getattr(seconds, name))
        if getattr(seconds, part) > 0
    ]
    return Report(
        f"{model.name}: step time",
        data,
        [
            _table(data, f"{model.name}, {format_count(tokens)} tokens on {machine.describe()}"),
            Table(
                f"one step: {format_duration(seconds.total)}",
                ("part", "time (ms)", "share (%)"),
                rows,
                f"{layout.describe()}; {1e3 * seconds.hidden_communication:.2f} ms of communication hide behind the rest",
            ),
            Bars("one step by part", "ms", [(model.name, [(part, 1e3 * getattr(seconds, part)) for part in PARTS])]),
            cost.draw_cost_by_size(config.model, machine, peak, max(data["mfu"], 1e-6)),
        ],
    )


def _money(machine: Machine | None, days: float) -> float | None:
    return None if machine is None or machine.price is None else cost.price_gpus(machine.gpus, days, machine.price)


def _sums(
    request: Request, total: float, gpus: int, peak: float, mfu: float, tokens: float, machine: Machine | None
) -> dict[str, Any]:
    days = cost.count_training_days(total, gpus, peak, mfu)
    price = machine.price if machine else request.number("price")
    return {
        "total_flops": total,
        "gpus": gpus,
        "gpu": machine.accelerator.name if machine else None,
        "peak_flops_per_second_per_gpu": peak,
        "mfu": mfu,
        "days": days,
        "hours": 24 * days,
        "gpu_days": gpus * days,
        "days_at_peak": cost.count_training_days(total, gpus, peak),
        "tokens_per_second": tokens / (days * 86400.0),
        "dollars": None if price is None else cost.price_gpus(gpus, days, price),
        "dollars_per_gpu_hour": price,
        "price_source": machine.price_source if machine else "given",
    }


def _table(data: dict[str, Any], title: str) -> Table:
    rows = [
        (
            "training FLOPs",
            format_count(data.get("total_flops") or data["flops_per_token"] * data["tokens"], 4),
            data["convention"],
        ),
        ("peak of one GPU (FLOP/s)", format_count(data["peak_flops_per_second_per_gpu"], 4), ""),
        ("MFU (%)", f"{100 * data['mfu']:.2f}", flops.DEFINITIONS[data["convention"]]),
    ]
    if "hfu" in data:
        rows.append(("HFU (%)", f"{100 * data['hfu']:.2f}", "with recomputed forwards"))
    rows += [
        ("tokens/s", format_count(data["tokens_per_second"], 4), ""),
        (
            "time (days)",
            f"{data['days']:.2f}",
            f"{data['hours']:.1f} hours; at the peak {data['days_at_peak']:.2f} days",
        ),
        ("GPU-days", format_count(data["gpu_days"], 4), f"{data['gpus']} GPUs"),
    ]
    if data.get("dollars") is not None:
        rows.append(("cost ($)", format_dollars(data["dollars"]), f"${data['dollars_per_gpu_hour']:.2f} a GPU-hour"))
    return Table(title, ("", "", "how"), rows)
