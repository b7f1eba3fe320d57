"""Failures, checkpoints and spares: how much of the wall clock trains."""

from dataclasses import asdict, dataclass
from math import exp, sqrt
from typing import Any

from megalm.config import ConfigError

HOURS = 3600.0
REPLACED = 0.25
"""Share of interruptions after which a node leaves for repair; the rest are cured by starting again
(DLRover reports about three quarters cured by a process restart)."""


def estimate_mtti_seconds(gpus: int, failures_per_1000_gpu_days: float) -> float:
    """Mean time to interruption of a job on `gpus` GPUs."""
    if failures_per_1000_gpu_days <= 0:
        return float("inf")
    return 1000.0 * 86400.0 / (failures_per_1000_gpu_days * gpus)


def parse_gpu_days_per_failure(nodes: int, gpus_per_node: int, days: float, failures: float = 1.0) -> float:
    """GPU-days per failure of an observation such as '1 of 16 nodes a week, 8 GPUs a node'."""
    return nodes * gpus_per_node * days / failures


def compute_young_daly(stall: float, mtti: float) -> float:
    """Best seconds between checkpoints that stall training for `stall` seconds: sqrt(2 stall MTTI) (Young 1974)."""
    return sqrt(2.0 * stall * mtti)


def estimate_checkpoint_loss(interval: float, stall: float, mtti: float) -> float:
    """Estimate share of the time lost to saving and to repeating work: stall/interval + interval/(2 MTTI)."""
    if mtti == float("inf"):
        return stall / interval if interval not in (0.0, float("inf")) else 0.0
    return stall / interval + interval / (2.0 * mtti)


@dataclass(frozen=True)
class Goodput:
    """What a job loses to failures, and what to do about it."""

    gpus: int
    failures_per_1000_gpu_days: float
    mtti: float
    interval: float
    interval_is_best: bool
    stall: float
    restart: float
    repair: float
    expected_failures: float | None
    """Over the whole run; None without its length."""
    checkpoint_share: float
    """Lost to saving and repeating."""
    restart_share: float
    """Lost to starting again."""
    waiting_share: float
    """Lost to waiting for a node with the spares there are."""
    spares: int
    best_spares: int
    spare_table: list[dict[str, float]]

    @property
    def effective(self) -> float:
        """Share of the wall clock in which new steps are trained."""
        return max(0.0, (1 - self.checkpoint_share) * (1 - self.waiting_share) / (1 + self.restart_share))

    def as_dict(self) -> dict[str, Any]:
        """With units in the keys."""
        values = asdict(self)
        return {
            "gpus": self.gpus,
            "failures_per_1000_gpu_days": self.failures_per_1000_gpu_days,
            "mtti_hours": _finite(self.mtti / HOURS),
            "failures_per_day": 86400.0 / self.mtti if self.mtti != float("inf") else 0.0,
            "expected_failures": self.expected_failures,
            "checkpoint_stall_seconds": self.stall,
            "checkpoint_interval_minutes": _finite(self.interval / 60),
            "checkpoint_interval_is_best": self.interval_is_best,
            "restart_minutes": self.restart / 60,
            "repair_hours": self.repair / HOURS,
            "checkpoint_loss_percent": 100 * self.checkpoint_share,
            "restart_loss_percent": 100 * self.restart_share,
            "waiting_loss_percent": 100 * self.waiting_share,
            "effective_training_time_percent": 100 * self.effective,
            "spare_nodes": self.spares,
            "best_spare_nodes": self.best_spares,
            "spares": values["spare_table"],
        }


def estimate_goodput(
    gpus: int,
    failures_per_1000_gpu_days: float,
    *,
    stall: float = 10.0,
    restart: float = 600.0,
    repair: float = 24 * HOURS,
    interval: float | None = None,
    spares: int | None = None,
    gpus_per_node: int = 8,
    days: float | None = None,
    mtti: float | None = None,
) -> Goodput:
    """Estimate losses of a job to failures; interval None: the best one, spares None: as many as pay.

    Args: seconds, but for `days` of training (without losses).
    Errors: ConfigError for values that are not positive.
    """
    for name, value in (
        ("stall", stall),
        ("restart", restart),
        ("repair", repair),
        ("failures", failures_per_1000_gpu_days),
    ):
        if value < 0:
            raise ConfigError(f"{name}={value}: must not be negative.")
    for name, size in (("interval", interval), ("mtti", mtti)):
        if size is not None and size <= 0:
            raise ConfigError(f"{name}={size}: must be positive.")
    if spares is not None and spares < 0:
        raise ConfigError(f"spares={spares}: must not be negative.")
    if gpus < 1:
        raise ConfigError(f"gpus={gpus}: at least one GPU is needed.")
    between = mtti if mtti is not None else estimate_mtti_seconds(gpus, failures_per_1000_gpu_days)
    best = compute_young_daly(stall, between) if between != float("inf") else float("inf")
    chosen = interval or best
    loss = estimate_checkpoint_loss(chosen, stall, between) if chosen else 0.0
    again = restart / between
    nodes = max(1, gpus // gpus_per_node)
    table = tabulate_spares(nodes, between, repair)
    pay = int(min(table, key=lambda row: row["relative_cost"])["spare_nodes"])
    held = pay if spares is None else spares
    waiting = _waiting(held, REPLACED * repair / between)
    result = Goodput(
        gpus=gpus,
        failures_per_1000_gpu_days=failures_per_1000_gpu_days,
        mtti=between,
        interval=chosen,
        interval_is_best=interval is None,
        stall=stall,
        restart=restart,
        repair=repair,
        expected_failures=None,
        checkpoint_share=min(loss, 1.0),
        restart_share=again,
        waiting_share=waiting,
        spares=held,
        best_spares=pay,
        spare_table=table,
    )
    if days is None:
        return result
    wall = days * 86400.0 / max(result.effective, 1e-9)
    return Goodput(
        **{**{f: getattr(result, f) for f in result.__dataclass_fields__}, "expected_failures": wall / between}
    )


def tabulate_spares(nodes: int, mtti: float, repair: float) -> list[dict[str, float]]:
    """For 0, 1, 2, ... spare nodes: the share of time spent waiting for a node, and the cost of a useful hour.

    Nodes leave for repair at rate REPLACED / MTTI and are back after `repair` seconds, so the number away is
    Poisson with mean REPLACED repair / MTTI; the job waits while more are away than there are spares.
    """
    away = REPLACED * repair / mtti if mtti else 0.0
    rows: list[dict[str, float]] = []
    best = float("inf")
    for spares in range(0, 10_000):
        waiting = _waiting(spares, away)
        cost = (nodes + spares) / nodes / max(1.0 - waiting, 1e-12)
        rows.append({"spare_nodes": spares, "waiting_percent": 100 * waiting, "relative_cost": cost})
        best = min(best, cost)
        if waiting < 1e-4 or (cost > best * 1.02 and waiting < 0.5):
            break
    return rows


def _waiting(spares: int, away: float) -> float:
    """P(more than `spares` nodes are away) for a Poisson mean."""
    term = total = exp(-away) if away < 700 else 0.0
    for count in range(1, spares + 1):
        term *= away / count
        total += term
    return max(0.0, 1.0 - total)


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None
