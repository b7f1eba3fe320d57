"""Tries places of this machine that were given up: a process in each, which must come to its end and multiply rightly."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from multiprocessing.context import ForkServerContext, ForkServerProcess

from megalm.config import Config
from megalm.launch.forkserver import hear_signals_again

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
"""Between two trials: doubled each time, as what is broken mostly stays so."""
PATIENCE_S = 60.0
"""After which a trial has failed: a device that is gone may keep its process for ever."""


class PlaceTrials:
    """Tries places beside the run, and never waits for them."""

    def __init__(self, context: ForkServerContext, config: Config) -> None:
        self._context, self._config = context, config
        self._running: dict[int, tuple[ForkServerProcess, float]] = {}
        self._next_s, self._wait_s = 0.0, FIRST_WAIT_S

    def begin(self, places: Collection[int], furthest: int) -> None:
        """Start to try these places together, unless that was done a short while ago. furthest: last step of the run."""
        now = time.monotonic()
        if self._running or now < self._next_s:
            return
        self._next_s, self._wait_s = now + self._wait_s, min(2 * self._wait_s, LONGEST_WAIT_S)
        for place in places:
            process = self._context.Process(target=try_place, args=(self._config, place, furthest), daemon=True)
            process.start()
            self._running[place] = (process, now + PATIENCE_S)

    def take(self) -> list[int] | None:
        """Take the places that work, once every trial under way has ended; None while one goes on, or where there was none."""
        if not self._running:
            return None
        for process, deadline in self._running.values():
            if process.exitcode is None and time.monotonic() < deadline:
                return None
        good = [place for place, (process, _) in self._running.items() if process.exitcode == 0]
        if good:
            self._wait_s = FIRST_WAIT_S
        self.stop()
        return good

    def stop(self) -> None:
        """End the trials under way."""
        for process, _ in self._running.values():
            if process.exitcode is None:
                process.kill()
                process.join(1.0)
        self._running.clear()


def try_place(config: Config, place: int, furthest: int) -> None:
    """Be a process on a place, as a rank would be; exit status 0 only where it works."""
    hear_signals_again()
    import torch

    from megalm.launch.world import choose_device_type
    from megalm.parallel.mesh import choose_local_device
    from megalm.resilience.chaos.faults import is_lost, strike
    from megalm.resilience.health.product import is_exact

    if is_lost(config.resilience.chaos, place, furthest):
        strike("lose")
    torch.set_num_threads(1)
    os._exit(0 if is_exact(choose_local_device(choose_device_type(config), place)) else 1)
