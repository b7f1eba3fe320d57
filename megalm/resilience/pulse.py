"""A rank's signs of life: a thread shows that the process runs, the trainer's own calls show that it gets on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, parent_process

from megalm.resilience.page import PHASES, Row, RunPage
from megalm.train.pulse import Phase, Pulse

BEAT_S = 0.2
"""Between two signs of life. A process that shows none for seconds is stopped, or holds Python's lock so long."""
WARMUP_STEPS = 5
"""Steps at the start of an attempt that teach nothing: memory is first touched, kernels are chosen, caches are cold."""
_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_ONCE = ("start", "join", "load", "end")


class RankPulse(Pulse):
    """Writes one rank's row of the page."""

    def __init__(self, page: RunPage, rank: int, tell: Callable[[BaseException], None]) -> None:
        """tell: hands an error to the supervisor, at once."""
        self.page, self.rank, self.tell = page, rank, tell
        self.row = Row(page, rank)
        self.entered: dict[Phase, int] = {}
        """When each phase was first come to in this process (CLOCK_MONOTONIC, ns)."""
        self._phase: Phase = "start"
        self._first_step = -1
        self._step = -1

    def enter(self, phase: Phase) -> None:
        self._mark(phase, 0)

    def begin_micro_batch(self, phase: Phase, number: int) -> None:
        self._mark(phase, number)

    def complete_step(self, step: int, durable: int | None) -> None:
        if self._first_step < 0:
            self._first_step = step
            self.row.set("begun", step)
        self._step = step
        self.row.set("step", step)
        self.row.set("durable", -1 if durable is None else durable)

    def finish(self, status: int) -> None:
        self._mark("end", 0)
        self.row.set("status", status)

    def fail(self, error: BaseException) -> None:
        self.tell(error)

    def _mark(self, phase: Phase, micro_batch: int) -> None:
        settled = self._step - self._first_step >= WARMUP_STEPS or self._phase in ("save", "evaluate")
        self.row.mark(_NUMBERS[phase], micro_batch, learned=settled and self._phase not in _ONCE)
        self._phase = phase
        if phase not in self.entered:
            self.entered[phase] = time.monotonic_ns()


def start_heart(pulse: RankPulse, grace_s: float) -> None:
    """Beat in a thread until the process ends; and let it end when its launcher is gone.

    Without a launcher the rank saves after the step under way and ends, as after a SIGTERM. Where that takes longer than
    `grace_s` (a peer is dead, say, and a collective waits for it), or nothing is left to save, it just ends.
    """
    parent = parent_process()
    assert parent is not None

    def beat() -> None:
        while not connection.wait([parent.sentinel], BEAT_S):
            pulse.row.show_life()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and pulse.page.position(pulse.rank).status < 0:
            pulse.row.show_life()
            time.sleep(BEAT_S)
        time.sleep(1.0)  # the main thread tidies up, and ends the process itself where it can
        os._exit(1)

    threading.Thread(target=beat, name="heart", daemon=True).start()
