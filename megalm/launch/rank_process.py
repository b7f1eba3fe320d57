"""What a rank's process does around the run itself: hears its supervisor, shows that it lives, and ends for certain."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megalm.config import Config, ConfigError
from megalm.launch.descriptors import Descriptor
from megalm.launch.forkserver import hear_signals_again
from megalm.launch.world import World
from megalm.resilience.page import RunPage
from megalm.resilience.restarted import Restart


@dataclass(frozen=True)
class Assignment:
    """All that a rank's process is given."""

    config: Config
    folder: Path
    plan: dict[str, Any]
    world: World
    meeting: Path
    """Folder of the file through which the ranks of this attempt find each other."""
    restart: Restart | None
    """What was before, where this is not the first attempt."""
    page: RunPage
    words: Connection
    """Takes (kind, text) of an error: refused (of the configuration) or failed."""
    stacks: Descriptor
    """File that SIGQUIT writes the stacks of all threads to."""
    locks: tuple[Descriptor, ...]
    """The run's locks, kept open until this process ends: so nobody takes the folder while it still writes there."""
    screen: tuple[Descriptor, Descriptor]
    """The launcher's standard output and error."""
    took_over: tuple[str, ...]
    """The dead holders of the run's locks."""


def start_rank(assignment: Assignment) -> None:
    """Be a rank, from the fork to the process' end; nothing of this process can keep it from ending."""
    for place, screen in zip((1, 2), assignment.screen, strict=True):
        os.dup2(screen.number, place)
    hear_signals_again()
    faulthandler.register(signal.SIGQUIT, file=assignment.stacks.number, all_threads=True)
    code = 1
    try:
        code = _run(assignment)
    finally:
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            shutil.rmtree(assignment.meeting, ignore_errors=True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        logging.shutdown()
        os._exit(code)  # no thread and no library that tidies up is waited for: what matters is saved


def _run(assignment: Assignment) -> int:
    import torch

    from megalm.launch.worker import Supervised, run_rank
    from megalm.resilience.pulse import RankPulse, start_heart

    def tell(error: BaseException) -> None:
        kind = "refused" if isinstance(error, ConfigError) else "failed"
        text = str(error) if kind == "refused" else f"{type(error).__name__}: {error}"
        assignment.words.send((kind, text))

    world, threads = assignment.world, os.environ.get("OMP_NUM_THREADS", "")
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.size),
    )  # fmt: skip
    if threads.isdecimal():
        torch.set_num_threads(max(1, int(threads)))
    pulse = RankPulse(assignment.page, world.rank, tell)
    start_heart(pulse, assignment.config.resilience.grace_s)
    try:
        return run_rank(
            assignment.config,
            assignment.folder,
            world,
            assignment.plan,
            Supervised(
                assignment.meeting / f"ranks-{assignment.restart.attempt if assignment.restart else 0}",
                pulse,
                assignment.restart,
                assignment.took_over,
            ),
        )
    except ConfigError:
        return 2
    except BaseException:
        return 1
