"""Watches the ranks of this machine: starts them, sees who is lost, stops the others, and starts all again.

    start -> watch -+-> all ended                        exit status of the run
                    +-> a signal: ask the ranks to save  130, within resilience.grace_s
                    +-> a rank is lost: find the culprit -> stop the group -> budget left? wait, start : give up (3)
                    +-> ranks were missing, and a place for them works: save -> start on more

The ranks of an attempt live and die together: a collective that has lost a member never comes back. What one restart costs
is written down phase by phase by the ranks that it started (`megalm.resilience.restarted`).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.store import open_store
from megalm.config import Config, ConfigError
from megalm.journal import EventLog
from megalm.launch.descriptors import Descriptor
from megalm.launch.forkserver import SIGNALS, prepare_ranks
from megalm.launch.hold import Held, hold_run
from megalm.launch.probe import PlaceTrials
from megalm.launch.rank_process import Assignment
from megalm.launch.ranks import RankGroup
from megalm.launch.resolve import fit_world
from megalm.launch.run_folder import log_file, write_stacks
from megalm.launch.world import World
from megalm.resilience.page import NONE, Position, RunPage, find_latest_step
from megalm.resilience.places import Places
from megalm.resilience.restarted import Restart
from megalm.resilience.restarts import Answer, RestartPolicy
from megalm.resilience.silence import Limits, Silence, Watch
from megalm.resilience.verdict import Failure, describe_exit, find_culprit, is_about_place

LOOK_S = 0.2
"""Between two looks at the page; a death is seen at once, whatever this is."""
SETTLE_S = 0.3
"""After the first failure: so long the others may say what they saw, before the culprit is chosen. A rank that dies breaks
its peers' connections at once, and they raise within milliseconds."""
STACKS_S = 1.0
"""Ranks that stand still have so long to write where; one that is stopped cannot."""
TIDY_S = 10.0
"""Ranks that have trained to their end may tidy up for so long; then they are ended."""


def supervise(config: Config, folder: Path, world_size: int, plan: dict[str, Any]) -> int:
    """Run all ranks on this machine until the run ends; returns its exit status.

    The ranks find each other through a file and talk over the loopback interface: no port is opened to the outside.
    Errors: ConfigError with the message of a rank that refused the configuration, or where another process has the run.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    with hold_run(config, folder, World(1)) as held:
        meeting = Path(tempfile.mkdtemp(prefix="megalm-"))
        try:
            return Supervisor(config, folder, world_size, plan, held, meeting).run()
        finally:
            shutil.rmtree(meeting, ignore_errors=True)


@dataclass
class Loss:
    """A rank is lost, and with it the attempt."""

    culprit: Failure
    step: int
    """Last step that was complete on any rank."""
    durable: int
    where: str
    """What the culprit was at."""
    fault_ns: int
    seen_ns: int
    ranks: tuple[int, ...]
    """All that were lost by themselves, and are no victims of the culprit."""
    trained: bool
    """The attempt had made a step."""


@dataclass(frozen=True)
class Growth:
    """The ranks have saved and ended, to be started again with more of them."""

    places: tuple[int, ...]
    asked_ns: int


class Supervisor:
    """One run's ranks on one machine, from the first attempt to the last."""

    def __init__(
        self, config: Config, folder: Path, world_size: int, plan: dict[str, Any], held: Held, meeting: Path
    ) -> None:
        self.config, self.folder, self.plan = config, folder, plan
        self.held, self.meeting = held, meeting
        self.context = prepare_ranks(max(1, (os.cpu_count() or 1) // world_size))
        self.page = RunPage(self.context, world_size)
        self.policy = RestartPolicy(config.resilience.max_restarts)
        self.places = Places(world_size, config.resilience.spares, self._fit)
        self.trials = PlaceTrials(self.context, config)
        self.growing: Growth | None = None
        self.last_step = self.furthest = NONE
        """Last step that was complete before the ranks were started again; and of all attempts."""
        self._tried_at = NONE
        self.attempt = 0
        self.heard: list[int] = []
        """Signals that the launcher was sent, in their order."""
        self.heard_at = 0.0

    def run(self) -> int:
        """Start ranks, again and again where that is right; returns the exit status."""
        with self._hearing():
            restart: Restart | None = None
            while True:
                group = self._start(restart)
                try:
                    ended = self._watch(group)
                finally:
                    self.trials.stop()
                    group.kill()
                    group.close()
                if isinstance(ended, Growth):
                    restart = self._grow(ended)
                    continue
                if isinstance(ended, int):
                    return ended
                restart = self._answer(ended)
                if restart is None:
                    return self._stopped_short() if self.heard else 3

    # ------------------------------------------------------------------------------------------------------- watching
    @property
    def world_size(self) -> int:
        """Ranks that the run has now."""
        return len(self.places.active)

    def _fit(self, places: int) -> int:
        found = fit_world(self.config, places)
        return 0 if found is None or found.world_size is None else found.world_size

    def _watch(self, group: RankGroup) -> int | Loss | Growth:
        """Until all ranks have ended (the run's exit status), or one is lost."""
        self.growing = None
        asked = False
        tidy: float | None = None
        settings = self.config.resilience
        limits = Limits(self.page.longest_s, settings.timeout_minutes * 60, settings.hang_timeout_s)
        watch = Watch(self.world_size, limits, 5 * LOOK_S)
        while not group.done:
            group.wait(LOOK_S)
            if self.heard and not asked:
                asked = True
                self._ask_to_stop(group)
            if self.heard and (self._is_hurried() or time.monotonic() > self.heard_at + self.config.resilience.grace_s):
                return self._stopped_short()
            if group.failures():
                return self._find_loss(group)
            silence = None if self.heard else watch.look(self.page.positions(), time.monotonic())
            if silence is not None:
                return self._find_silent(group, silence)
            if not self.heard and self.places.out and self.growing is None:
                self._look_for_places(group)
            if None not in group.statuses:
                tidy = tidy or time.monotonic() + TIDY_S
                if time.monotonic() > tidy:
                    break
        if group.failures():
            return self._find_loss(group)
        status = max(status for status in group.statuses if status is not None)
        return self.growing if self.growing is not None and status == 130 and not self.heard else status

    def _look_for_places(self, group: RankGroup) -> None:
        """After each save try what is out; where the run can grow by it, have the ranks save and end."""
        positions = self.page.positions()
        durable = max(position.durable for position in positions)
        if durable > self._tried_at:
            self._tried_at = durable
            self.trials.begin(self.places.out, max(self.furthest, find_latest_step(positions)))
        good = self.trials.take()
        if good and self.places.take_back(good):
            self.growing = Growth(tuple(good), time.monotonic_ns())
            group.send(signal.SIGTERM)

    def _ask_to_stop(self, group: RankGroup) -> None:
        """Have the ranks save and end; one that has not begun to train has nothing to save, and just ends."""
        self.page.signal = self.heard[0]
        group.send(signal.SIGTERM)

    def _is_hurried(self) -> bool:
        """True when whoever sits at the terminal wants the end now."""
        return self.heard.count(signal.SIGINT) > 1

    def _find_loss(self, group: RankGroup) -> Loss:
        """Choose the culprit, once its victims had time to say what they saw. Errors: ConfigError that a rank raised."""
        seen = min(f.moment_ns for f in group.failures())
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and len(group.failures()) < self.world_size:
            group.wait(max(0.0, deadline - time.monotonic()))
        failures = [
            Failure(f.rank, f.exit, f.error or group.processes[f.rank].refusal, f.moment_ns) for f in group.failures()
        ]
        positions = self.page.positions()
        culprit = find_culprit(failures, dict(enumerate(positions)))
        refusal = group.processes[culprit.rank].refusal
        if refusal is not None and self.attempt == 0:
            group.kill()
            raise ConfigError(refusal)
        position = positions[culprit.rank]
        fault = max(position.alive_ns, position.mark_ns)
        pid = group.processes[culprit.rank].process.pid
        group.kill()
        durable = self._find_durable(positions)
        alone = tuple(
            {culprit.rank, *(f.rank for f in failures if f.error is None and f.exit is not None and f.exit < 0)}
        )
        loss = self._lose(culprit, positions, durable, min(fault, seen), seen, alone)
        if not self.heard:
            self._tell_loss(loss, pid)
        return loss

    def _find_silent(self, group: RankGroup, silence: Silence) -> Loss:
        """Ask all ranks where they stand, keep that, and end them: one that stands still hears nothing else."""
        seen = time.monotonic_ns()
        positions = self.page.positions()
        ranks = [rank for rank, position in enumerate(positions) if position.status < 0]
        stacks = group.stacks(ranks, STACKS_S)
        group.kill()
        files = write_stacks(self.folder, self.attempt, stacks)
        position = positions[silence.rank]
        self._write(
            "hang", find_latest_step(positions), rank=silence.rank, frozen=silence.frozen, phase=position.describe(),
            ranks={str(rank): positions[rank].describe() for rank in ranks}, silent_s=round(silence.silent_s, 1),
            stacks=[str(file) for file in files], attempt=self.attempt,
        )  # fmt: skip
        culprit = Failure(silence.rank, None, None, seen, frozen=silence.frozen)
        durable = self._find_durable(positions)
        fault = max(position.alive_ns if silence.frozen else position.mark_ns, 0)
        return self._lose(culprit, positions, durable, min(fault, seen), seen, (silence.rank,))

    def _lose(
        self,
        culprit: Failure,
        positions: Sequence[Position],
        durable: int,
        fault_ns: int,
        seen_ns: int,
        ranks: tuple[int, ...],
    ) -> Loss:
        latest = find_latest_step(positions)
        self.last_step = latest if latest >= 0 else self.last_step
        self.furthest = max(self.furthest, latest)
        where, trained = positions[culprit.rank].describe(), any(position.trained for position in positions)
        return Loss(culprit, latest, durable, where, fault_ns, seen_ns, ranks, trained)

    # -------------------------------------------------------------------------------------------------------- deciding
    def _answer(self, loss: Loss) -> Restart | None:
        """Decide what follows, and wait for it; None: nothing more is started."""
        stopped = time.monotonic_ns()
        if self.heard:
            return None
        place, before = self.places.active[loss.culprit.rank], self.world_size
        out = self.places.lose(loss.ranks, trained=loss.trained) if is_about_place(loss.culprit) else []
        answer = Answer() if out else self.policy.answer(loss.culprit, loss.where, loss.durable)
        if answer.reason is not None:
            self._give_up(loss, answer.reason)
            return None
        what = f"rank {loss.culprit.rank} {loss.culprit.describe()} in {loss.where}"
        when = f"in {answer.wait_s:g} s" if answer.wait_s else "now"
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        if out:
            self._tried_at = loss.durable
            what += f", and place {place} of this machine is out" if out == [place] else (
                f", and places {', '.join(map(str, out))} of this machine are out")  # fmt: skip
            say(f"{what}: starting {ranks}{' on a spare' * (self.world_size == before)} {when}")
        else:
            say(f"{what}: starting {ranks} again {when}, restart {self.policy.spent} of {self.policy.most}")
        until = time.monotonic() + answer.wait_s
        while time.monotonic() < until and not self.heard:
            time.sleep(min(0.05, answer.wait_s))
        if self.heard:
            return None
        return self._make_restart(what, loss.fault_ns, loss.seen_ns, stopped)

    def _grow(self, growth: Growth) -> Restart:
        """The ranks have saved: nothing is lost by starting them again on the places that have come back."""
        numbers = ", ".join(map(str, growth.places))
        what = f"place{'s' * (len(growth.places) > 1)} {numbers} of this machine work{'s' * (len(growth.places) == 1)} again"
        say(f"{what}: starting {self.world_size} ranks")
        self.last_step = latest = find_latest_step(self.page.positions())
        self.furthest = max(self.furthest, latest)
        return self._make_restart(what, growth.asked_ns, growth.asked_ns, time.monotonic_ns())

    def _make_restart(self, reason: str, fault_ns: int, seen_ns: int, stopped_ns: int) -> Restart:
        self.attempt += 1
        out = tuple(self.places.out)
        return Restart(
            self.attempt, reason, self.last_step, self.furthest, out, fault_ns, seen_ns, stopped_ns, time.monotonic_ns()
        )

    def _give_up(self, loss: Loss, reason: str) -> None:
        """Say why nothing is started any more, where the log is, and what a person can do."""
        from megalm.observe.report import write_report

        self._write("give_up", loss.step, reason=reason, rank=loss.culprit.rank)
        if (self.folder / "metrics.jsonl").exists():
            write_report(self.folder)
        say(
            f"error: {reason}.\nIts log is {log_file(self.folder, loss.culprit.rank)}, the report {self.folder}/report.html. "
            f"{self._newest(loss.durable)} When the cause is mended, the same command goes on from there."
        )

    def _stopped_short(self) -> int:
        """End before the ranks could save, and say what is lost; 130 where nothing is."""
        positions = self.page.positions()
        step, durable = find_latest_step(positions), self._find_durable(positions)
        name = signal.Signals(self.heard[0]).name
        if step <= max(durable, 0):
            return 130
        self._write("preempted", step, signal=name)
        hurried = "a second SIGINT: ended at once" if self._is_hurried() else (
            f"{name}: the ranks did not save within resilience.grace_s={self.config.resilience.grace_s:g}")  # fmt: skip
        say(f"error: {hurried}, at step {step}. {self._newest(durable)} The same command goes on from there.")
        return 1

    def _find_durable(self, positions: Sequence[Position]) -> int:
        """Step of the newest checkpoint: one that was committed after the ranks last looked counts, too."""
        known = [position.durable for position in positions]
        with suppress(OSError, CheckpointError, ConfigError):  # a store that is away: what the ranks knew
            store = open_store(self.config.checkpoint.path or self.folder / "checkpoints")
            known += [store.step(name) for name in store.names()]
        return max(known)

    @staticmethod
    def _newest(durable: int) -> str:
        return "There is no checkpoint." if durable == NONE else f"The newest checkpoint is of step {durable}."

    # ----------------------------------------------------------------------------------------------------------- details
    def _start(self, restart: Restart | None) -> RankGroup:
        locks = tuple(Descriptor(lock.descriptor) for lock in self.held.locks if lock.descriptor is not None)
        nothing: Any = None
        config = fit_world(self.config, self.world_size)
        assert config is not None
        common = Assignment(
            config=config,
            folder=self.folder,
            plan=self.plan,
            world=World(self.world_size),
            meeting=self.meeting,
            restart=restart,
            page=self.page,
            words=nothing,
            stacks=nothing,
            locks=locks,
            screen=(Descriptor(1), Descriptor(2)),
            took_over=tuple(holder.describe() for holder in self.held.former) if restart is None else (),
        )
        return RankGroup(self.context, self.page, common, self.places.active)

    def _tell_loss(self, loss: Loss, pid: int | None) -> None:
        failure = loss.culprit
        self._write(
            "rank_lost", max(0, loss.step), rank=failure.rank, local_rank=self.places.active[failure.rank],
            host=socket.gethostname(), pid=pid, exit=describe_exit(failure.exit), error=failure.error, attempt=self.attempt,
            where=loss.where,
        )  # fmt: skip

    def _write(self, kind: str, step: int, **fields: Any) -> None:
        """Write an event; no rank is left that could write at the same time."""
        events = EventLog(self.folder / "events.jsonl")
        events.write(kind, step=max(0, step), **fields)
        events.close()

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        """Note signals while the ranks are watched, in place of dying of them."""

        def hear(number: int, frame: FrameType | None) -> None:
            self.heard_at = self.heard_at or time.monotonic()
            self.heard.append(number)

        previous = {number: signal.signal(number, hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def say(text: str) -> None:
    """Tell the person who started the run; a screen that is gone keeps nothing from going on."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
