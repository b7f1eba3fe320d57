"""Trackers by the name that `tracking.trackers` calls them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalm.config import Config
from megalm.config.registry import Registry
from megalm.observe.trackers.tracker import Tracker

BuildTracker = Callable[[Config, Path], Tracker]
"""Makes a tracker of a run's resolved configuration and its folder, on every rank: a package that is missing is said by all
of them. Its methods are called on rank 0 alone."""


def _build_mlflow(config: Config, folder: Path) -> Tracker:
    from megalm.observe.trackers.mlflow import MLflow

    return MLflow(folder, config.tracking.project)


def _build_wandb(config: Config, folder: Path) -> Tracker:
    from megalm.observe.trackers.wandb import WeightsAndBiases

    return WeightsAndBiases(folder, config.tracking.project)


TRACKERS: Registry[BuildTracker] = Registry(
    "tracker", "tracking.trackers", {"mlflow": _build_mlflow, "wandb": _build_wandb}
)


def register_tracker(name: str, build: BuildTracker) -> None:
    """Let `tracking.trackers=[NAME]` show runs there. Errors: ValueError where the name is taken."""
    TRACKERS.register(name, build)
