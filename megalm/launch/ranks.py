"""The processes of a run on one machine: started together, watched together, ended together."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

from megalm.launch.descriptors import Descriptor, make_nameless_file
from megalm.launch.rank_process import Assignment, start_rank
from megalm.launch.world import World
from megalm.resilience.page import RunPage
from megalm.resilience.verdict import Failure

SHOW_CURSOR = "\x1b[?25h"


@dataclass
class RankProcess:
    """One rank's process, as its supervisor sees it."""

    rank: int
    process: ForkServerProcess
    words: Connection
    stacks: Descriptor
    error: str | None = None
    refusal: str | None = None
    """Message of a configuration that the rank refused."""
    moment_ns: int = 0
    """When its end, or its error, was seen."""
    ended: bool = False

    def __post_init__(self) -> None:
        assert self.process.pid is not None
        self.handle = os.pidfd_open(self.process.pid) if hasattr(os, "pidfd_open") else None
        """Names this very process, also when whoever forked it is gone, and its number is another one's."""

    @property
    def gone(self) -> bool:
        """True when the process has ended."""
        if self.handle is None:
            return self.process.exitcode is not None
        return bool(select.select([self.handle], [], [], 0)[0])

    def send(self, number: int) -> None:
        """Send it a signal; nothing happens where it has ended."""
        with suppress(ProcessLookupError):
            if self.handle is not None:
                signal.pidfd_send_signal(self.handle, number)
            elif self.process.exitcode is None and self.process.pid is not None:
                os.kill(self.process.pid, number)

    def close(self) -> None:
        """Give back what watching took."""
        self.process.join(1.0)  # its end is seen before whoever forked it has told us
        self.words.close()
        os.close(self.stacks.number)
        if self.handle is not None:
            os.close(self.handle)
        with suppress(ValueError):  # who forked it was killed, too, and will never tell
            self.process.close()

    def listen(self) -> None:
        """Take what the rank has said."""
        try:
            while self.words.poll():
                kind, text = self.words.recv()
                if kind == "refused":
                    self.refusal = text
                else:
                    self.error = text
                self.moment_ns = self.moment_ns or time.monotonic_ns()
        except (EOFError, OSError):
            pass

    @property
    def exit(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if not self.gone:
            return None
        self.process.join(1.0)  # whoever forked it says how it ended
        return self.process.exitcode


class RankGroup:
    """All ranks of one attempt."""

    def __init__(self, context: ForkServerContext, page: RunPage, common: Assignment, places: Sequence[int]) -> None:
        """common: what all ranks are given; rank, words and stacks are filled in. places: of this machine, one for each rank."""
        self.page = page
        page.resize(len(places))
        self.processes: list[RankProcess] = []
        for rank, place in enumerate(places):
            page.begin(rank)
            words, theirs = context.Pipe(duplex=False)
            stacks = make_nameless_file(f"stacks-{rank}")
            world = World(len(places), rank, place)
            given = replace(common, world=world, words=theirs, stacks=stacks, locks=common.locks if rank == 0 else ())
            process = context.Process(target=start_rank, args=(given,), name=f"rank {rank}", daemon=False)
            process.start()
            theirs.close()
            self.processes.append(RankProcess(rank, process, words, stacks))

    def wait(self, seconds: float) -> None:
        """Return when a rank ends or says something, and after so many seconds at the latest; notes what happened."""
        alive = [p for p in self.processes if not p.ended]
        watched: list[int | Connection] = [p.process.sentinel if p.handle is None else p.handle for p in alive]
        watched += [p.words for p in alive if p.error is None and p.refusal is None]
        connection.wait(watched, seconds)
        for process in alive:
            process.listen()
            if process.gone:
                process.listen()
                process.ended, process.moment_ns = True, process.moment_ns or time.monotonic_ns()

    def status(self, process: RankProcess) -> int | None:
        """The exit status that the rank came to by training to an end; None where it did not."""
        status = self.page.position(process.rank).status
        return status if status >= 0 else None

    @property
    def statuses(self) -> list[int | None]:
        """Of all ranks, in their order."""
        return [self.status(process) for process in self.processes]

    @property
    def done(self) -> bool:
        """True when no process is left."""
        return all(process.ended for process in self.processes)

    def failures(self) -> list[Failure]:
        """List the ranks that failed so far: an error that was told, or an end without having trained to one."""
        return [
            Failure(p.rank, p.exit if p.ended else None, p.error, p.moment_ns)
            for p in self.processes
            if self.status(p) is None and (p.error is not None or p.refusal is not None or p.ended)
        ]

    def send(self, number: int) -> None:
        """Send a signal to every process that still runs."""
        for process in self.processes:
            process.send(number)

    def kill(self) -> None:
        """End every process at once, and return when none is left."""
        self.send(signal.SIGKILL)
        while not self.done:
            self.wait(0.05)
            self.send(signal.SIGKILL)
        if sys.stdout.isatty():  # a rank that was killed under its progress line had hidden it
            sys.stdout.write(SHOW_CURSOR)
            sys.stdout.flush()

    def stacks(self, ranks: Sequence[int], patience_s: float) -> dict[int, str]:
        """Ask these ranks where they stand, line by line; a rank that cannot answer in time is left out."""
        for rank in ranks:
            self.processes[rank].send(signal.SIGQUIT)
        deadline = time.monotonic() + patience_s
        texts: dict[int, str] = {}
        while time.monotonic() < deadline and len(texts) < len(ranks):
            time.sleep(0.05)
            for rank in ranks:
                text = _read(self.processes[rank].stacks)
                if text.endswith("\n"):
                    texts[rank] = text
        return texts

    def close(self) -> None:
        """Give back what watching took."""
        for process in self.processes:
            process.close()


def _read(file: Descriptor) -> str:
    return os.pread(file.number, os.fstat(file.number).st_size, 0).decode(errors="replace")
