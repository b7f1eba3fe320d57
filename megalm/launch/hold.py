"""Holding what a run writes into, for all its ranks: rank 0 takes the locks, the others hear whether it could."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megalm.checkpoint.address import read_url
from megalm.config import Config
from megalm.launch.lock import FolderLock, Holder
from megalm.launch.world import World

log = logging.getLogger("megalm")


@dataclass
class Held:
    """What is held, and the dead holders that it was taken over from."""

    locks: list[FolderLock] = field(default_factory=list)
    former: list[Holder] = field(default_factory=list)


@contextmanager
def hold_run(config: Config, folder: Path, world: World) -> Iterator[Held]:
    """Hold the run's folder and the place of its checkpoints.

    world: the processes that hold it together, all of which call this once they have joined; all of them go on or none. Comm: one
    broadcast from rank 0.
    Errors: ConfigError where another process has one of them.
    """
    held = Held()
    problem: Exception | None = None
    try:
        if world.rank == 0:
            try:
                for lock in _locks(config, folder):
                    dead = lock.acquire()
                    held.locks.append(lock)
                    held.former += [dead] if dead is not None else []
            except Exception as error:
                problem = error
        outcome = [problem]
        if world.size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            raise outcome[0]
        for dead in held.former:
            log.info("took over from %s, which is gone", dead.describe())
        yield held
    finally:
        for lock in reversed(held.locks):
            lock.release()


def _locks(config: Config, folder: Path) -> list[FolderLock]:
    """List the locks: of the run's folder, and of its place of checkpoints, which another run's `checkpoint.path` may name, too.

    In an object store there is no lock to take.
    """
    locks = [FolderLock(folder, config.run.name)]
    place = config.checkpoint.path or folder / "checkpoints"
    if read_url(place) is None and Path(place).resolve() != folder.resolve():
        locks.append(FolderLock(Path(place), config.run.name, key="checkpoint.path"))
    return locks
