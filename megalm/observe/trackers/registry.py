"""Trackers by the name that `tracking.trackers` calls them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalm.config import Config
from megalm.config.registry import Registry
from megalm.observe.trackers.tracker import Tracker

BuildTracker = Callable[[Config, Path], Tracker]
"""Makes a tracker of a run's resolved configuration and its folder; called on rank 0 alone."""

TRACKERS: Registry[BuildTracker] = Registry("tracker", "tracking.trackers")


def register_tracker(name: str, build: BuildTracker) -> None:
    """Let `tracking.trackers=[NAME]` show runs there. Errors: ValueError where the name is taken."""
    TRACKERS.register(name, build)
