"""Dollars: GPU-hours, people's data, checkpoints in object storage."""

import re
from dataclasses import dataclass
from typing import Any

from megalm.architecture.tensors import ParameterCounts, count_parameters
from megalm.config import ConfigError, ModelConfig
from megalm.config.cluster import read_prices
from megalm.page.plots import Line, Lines
from megalm.plan.machine import Machine
from megalm.plan.models import list_models

CHECKPOINT_BYTES = 12.0
"""Bytes a parameter in a checkpoint: fp32 master and the two moments of Adam."""


def count_training_days(flops: float, gpus: int, peak: float, mfu: float = 1.0) -> float:
    """Days that `flops` take on GPUs of `peak` FLOP/s at a utilisation (1: the peak itself)."""
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu={mfu}: a share of the peak, above 0 and at most 1 (50.7% is mfu=0.507).")
    return flops / (gpus * peak * mfu) / 86400.0


def price_gpus(gpus: int, days: float, price: float) -> float:
    """Dollars of `gpus` GPUs for `days` at `price` a GPU-hour."""
    return gpus * days * 24.0 * price


def price_human_data(counts: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Dollars of after-training data made by people: {kind: count} with the kinds of conf/prices.yaml."""
    table = read_prices()["human_data"]
    bill = {}
    for kind, count in counts.items():
        if kind not in table:
            raise ConfigError(f"{kind}: conf/prices.yaml knows {', '.join(table)}.")
        if count < 0:
            raise ConfigError(f"{kind}={count:g}: must not be negative.")
        price = float(table[kind]["price"])
        bill[kind] = {"count": count, "dollars_each": price, "dollars": count * price, "source": table[kind]["source"]}
    return bill


@dataclass(frozen=True)
class StorageCost:
    """Checkpoints in object storage."""

    checkpoint_bytes: float
    kept: int
    months: float
    dollars: float
    source: str


def price_checkpoint_storage(counts: ParameterCounts | int, kept: int, days: float) -> StorageCost:
    """Dollars of keeping `kept` checkpoints for `days`."""
    total = counts if isinstance(counts, int) else counts.total
    entry = read_prices()["storage"]["gb_month"]
    size = CHECKPOINT_BYTES * total
    months = days / 30.4375
    dollars = size / 1e9 * kept * months * float(entry["price"])
    return StorageCost(size, kept, months, dollars, f"{entry['source']} ({entry['date']})")


def draw_cost_by_size(model: ModelConfig, found: Machine, peak: float, mfu: float) -> Lines:
    """Draw dollars (or GPU-days without a price) of compute-optimal training against model size, at one utilisation."""
    price = found.price
    unit = "cost ($)" if price is not None else "GPU-days"
    scale = 24.0 * price if price is not None else 1.0

    def amount(size: float, ratio: float) -> float:
        return scale * count_training_days(6.0 * size * ratio * size, 1, peak, min(1.0, mfu))

    sizes = [1e8 * 10 ** (i / 6) for i in range(19)]
    own = float(count_parameters(model).active)
    marks = [
        (name, float(count_parameters(m).active)) for name, m in list_models().items() if re.fullmatch(r"\d+[mb]", name)
    ]
    return Lines(
        f"cost against model size at {100 * mfu:.0f}% MFU on {found.accelerator.name}",
        "parameters",
        unit,
        [Line(f"{ratio} tokens a parameter", [(n, amount(n, ratio)) for n in sizes]) for ratio in (20, 100, 300)],
        log="xy",
        dots=[(name, n, amount(n, 20)) for name, n in marks if n >= 1e8] + [(model.name, own, amount(own, 20))],
    )
