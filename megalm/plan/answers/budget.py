"""The best model and token count for a budget, beside published models' ratios."""

from typing import Any

from megalm.architecture.tensors import count_parameters
from megalm.config import ConfigError
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.page.plots import Line, Lines
from megalm.plan.budget import LAWS, TOKENS_PER_PARAMETER, Choice, Law, list_choices
from megalm.plan.models import list_models, scale_model
from megalm.plan.render import format_dollars
from megalm.plan.report import Report
from megalm.plan.request import Request, choose_machine, compose

HELP = "the best model and token count for a budget"
KEYS = [
    "dollars", "gpu_days", "gpu_hours", "gpus", "gpu", "peak", "dtype", "mfu", "price", "price_list",
    "inference_tokens", "inference_mfu", "law", "ratio", "tokens", "seq_length",
]  # fmt: skip
EXAMPLE = "megalm plan budget dollars=1M gpu=h100 mfu=0.4 inference_tokens=2T"

DEFAULT_MFU = 0.4
"""Utilisation when none is given: what well-tuned runs reach."""


def answer(request: Request) -> Report:
    """Attempt 1: compute-optimal; attempt 2, with inference_tokens: lifecycle-optimal."""
    hours, spent, price, machine = _gpu_hours(request)
    mfu = request.number("mfu") or DEFAULT_MFU
    peak = request.number("peak") or (
        machine.peak(request.word("dtype") or ("fp32" if machine.is_cpu else "bf16")) if machine else 0.0
    )
    if not peak:
        raise ConfigError("which GPU? Add gpu=h100 (or peak=312e12, FLOP/s of one GPU).")
    law = LAWS.get((request.word("law") or "besiroglu").lower())
    if law is None:
        raise ConfigError(f"law={request.word('law')}: one of {', '.join(LAWS)}.")
    flops = hours * 3600.0 * peak * mfu
    served = request.number("inference_tokens") or 0.0
    serving = request.number("inference_mfu") or mfu
    ratio = request.number("ratio") or 20.0
    found_choices = list_choices(flops, inference_tokens=served, inference_cost=mfu / serving, law=law, ratio=ratio)
    if request.has_model:
        found_choices.append(_given_model(request, flops, spent, hours, law, served * mfu / serving))
    gpus = request.whole("gpus")
    rows, answers = [], []
    for choice in found_choices:
        entry = _entry(choice, flops, hours, price, gpus)
        answers.append(entry)
        rows.append(
            (
                choice.name,
                format_count(choice.parameters),
                format_count(choice.tokens),
                f"{choice.ratio:.1f}",
                f"{choice.loss:.4f}",
                format_count(choice.training_flops),
                format_dollars(entry["training_dollars"]),
                *((format_dollars(entry["inference_dollars"]),) if served else ()),
                entry["nearest_model"],
                entry["shape"],
            )
        )
    headers = (
        "attempt", "parameters", "tokens", "tokens a parameter", "predicted loss (nats)", "training FLOPs", "training ($)",
        *(("serving ($)",) if served else ()), "nearest model", "a shape: layers x width",
    )  # fmt: skip
    data: dict[str, Any] = {
        "budget_gpu_hours": hours,
        "budget_gpu_days": hours / 24,
        "budget_dollars": spent,
        "budget_flops": flops,
        "gpu": machine.accelerator.name if machine else None,
        "peak_flops_per_second_per_gpu": peak,
        "mfu": mfu,
        "dollars_per_gpu_hour": price,
        "inference_tokens": served,
        "law": {
            "name": law.name,
            "E": law.e,
            "A": law.a,
            "B": law.b,
            "alpha": law.alpha,
            "beta": law.beta,
            "source": law.source,
        },
        "parameters": found_choices[0].parameters,
        "tokens": found_choices[0].tokens,
        "choices": answers,
        "tokens_per_parameter": {name: tokens / size for name, (tokens, size) in TOKENS_PER_PARAMETER.items()},
    }
    ratios = [
        (name, format_count(size), format_count(tokens), f"{tokens / size:.1f}")
        for name, (tokens, size) in TOKENS_PER_PARAMETER.items()
    ]
    ratios += [(c.name, format_count(c.parameters), format_count(c.tokens), f"{c.ratio:.1f}") for c in found_choices]
    title = f"{format_count(flops, 4)} FLOPs: {hours / 24:,.1f} GPU-days" + (
        f" of {machine.accelerator.description}" if machine else ""
    )
    sizes = [found_choices[0].parameters * 10 ** (i / 20) for i in range(-24, 21)]
    line = [(n, law.loss(n, flops / 6 / n)) for n in sizes]
    series = [Line("training takes the whole budget", line)]
    if served:
        kept = [(n, flops / (6 * n) - served * mfu / serving / 3) for n in sizes]
        series.append(Line("budget pays serving, too", [(n, law.loss(n, d)) for n, d in kept if d > 0]))
    return Report(
        "budget",
        data,
        [
            Table(title + f" at {100 * mfu:.0f}% MFU", headers, rows, _note(served)),
            Table("beside published models", ("model", "parameters", "tokens", "tokens a parameter"), ratios),
            Lines("predicted loss against model size, for this budget", "parameters", "loss (nats)", series, log="x",
                   dots=[(c.name.split(",")[0], c.parameters, c.loss) for c in found_choices]),
        ],
    )  # fmt: skip


def _given_model(request: Request, flops: float, spent: float | None, hours: float, law: Law, served: float) -> Choice:
    """The model that was asked for, on as many tokens as the budget buys."""
    config = compose(request)
    size = float(count_parameters(config.model).active)
    tokens, wanted = flops / 6 / size, request.number("tokens")
    if wanted and wanted > tokens:
        much = f"${spent * wanted / tokens:,.0f}" if spent else f"{hours / 24 * wanted / tokens:,.0f} GPU-days"
        raise ConfigError(
            f"impossible budget: {config.model.name} on {format_count(wanted)} tokens takes {much}; this budget buys"
            f" {format_count(tokens)} tokens of it. Raise the budget, or choose {format_count(flops / 6 / wanted)} parameters or"
            " fewer for as many tokens."
        )
    return Choice(
        f"{config.model.name}, all the budget",
        size,
        tokens,
        law.loss(size, tokens),
        flops,
        2 * size * served,
        "the model asked for",
    )


def _note(served: float) -> str:
    if not served:
        return (
            "add inference_tokens=2T (tokens that the model will read and write in its life) for the lifecycle optimum"
        )
    return (
        f"{format_count(served)} tokens served at 2 N FLOPs each: the whole-budget attempt pays them from the budget;"
        " the same-loss attempt trains longer and saves in serving"
    )


def _gpu_hours(request: Request) -> tuple[float, float | None, float | None, Any]:
    machine = choose_machine(request) if request.word("gpu") else None
    price = machine.price if machine else request.number("price")
    spent = request.number("dollars")
    given = [name for name in ("dollars", "gpu_days", "gpu_hours") if name in request.own]
    if len(given) != 1:
        raise ConfigError(
            f"a budget is one of dollars=, gpu_days= or gpu_hours= ({len(given)} given): for example dollars=1M."
        )
    if spent is not None:
        if not price:
            raise ConfigError("dollars buy GPU-hours at a price: add gpu=h100 (conf/prices.yaml) or price=2.5.")
        return spent / price, spent, price, machine
    hours = request.number("gpu_hours") or 24.0 * (request.number("gpu_days") or 0.0)
    return hours, hours * price if price else None, price, machine


def _entry(choice: Choice, flops: float, hours: float, price: float | None, gpus: int | None) -> dict[str, Any]:
    share = choice.training_flops / flops * hours
    later = choice.inference_flops / flops * hours
    close = min(list_models().items(), key=lambda item: abs(count_parameters(item[1]).total / choice.parameters - 1))[0]
    shape = scale_model(choice.parameters) if 2e7 <= choice.parameters <= 1.5e12 else None
    return {
        "name": choice.name,
        "parameters": choice.parameters,
        "tokens": choice.tokens,
        "tokens_per_parameter": choice.ratio,
        "loss_nats": choice.loss,
        "training_flops": choice.training_flops,
        "inference_flops": choice.inference_flops,
        "training_gpu_hours": share,
        "training_gpu_days": share / 24,
        "training_days": share / 24 / gpus if gpus else None,
        "training_dollars": share * price if price else None,
        "inference_dollars": later * price if price else None,
        "dollars": (share + later) * price if price else None,
        "nearest_model": close,
        "shape": f"{shape.num_layers} x {shape.hidden_size}" if shape else "-",
        "why": choice.why,
    }
