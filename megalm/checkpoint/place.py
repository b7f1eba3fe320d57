"""Whose a place of checkpoints is, and whether one more would go into it: asked before a run's first step."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError, NoSpaceError
from megalm.checkpoint.load import read_state
from megalm.checkpoint.ranks import Ranks, run_on_rank_0
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.store import Store, place_of
from megalm.config.errors import ConfigError

OWNER = "run.json"
"""Beside the checkpoints: the name of the run that writes there."""


@dataclass(frozen=True)
class SetAside:
    """Checkpoints of another course of the run, and where they lie now."""

    steps: list[int]
    where: str


class Place:
    """What a run asks of the place of its checkpoints before its first step. Every method is collective."""

    def __init__(self, store: Store, ranks: Ranks) -> None:
        self.store, self.ranks = store, ranks

    def claim(self, run: str) -> None:
        """Write down whose checkpoints these are. Errors: ConfigError if they are another run's."""
        run_on_rank_0(self.ranks, lambda: claim(self.store, run))

    def holds(self, path: Path | str) -> bool:
        """Whether `path` is this place, or a checkpoint in it."""
        return bool(run_on_rank_0(self.ranks, lambda: place_of(path) == place_of(self.store.where)))

    def prepare(self, needed: int, retention: Retention) -> None:
        """Clear what crashes left, and see that `needed` bytes can be saved. Errors: CheckpointError if they cannot."""

        def try_store() -> None:
            self.store.clear()
            try:
                self.store.try_writing()
            except NoSpaceError:
                if not retention.make_room():
                    raise
                self.store.try_writing()
            check_room(self.store, needed, frees=retention.config.keep > 0)

        run_on_rank_0(self.ranks, try_store)

    def set_aside_after(self, step: int) -> SetAside | None:
        """Move checkpoints of later steps to where they are never counted, resumed or deleted; None if there are none.

        For those of another course: a run that begins anew in this place, or at an earlier step because they are damaged.
        """

        def move() -> SetAside | None:
            names = [name for name in self.store.names() if self.store.step(name) > step]
            if not names:
                return None
            return SetAside(sorted({self.store.step(name) for name in names}), self.store.set_aside(names))

        return run_on_rank_0(self.ranks, move)


def claim(store: Store, run: str) -> None:
    """Write down that `run` saves in the store. Errors: ConfigError if another run does.

    Two runs in one place would take up each other's checkpoints, and each would delete the other's.
    """
    owner = find_owner(store)
    if owner == run:
        return
    if owner is not None:
        raise ConfigError(
            f"checkpoint.path={store.where} is where the run {owner!r} saves, and this run is {run!r}: one place holds the "
            f"checkpoints of one run. Give this run a checkpoint.path of its own (with checkpoint.load_path={store.where} it "
            f"begins with what is there), or go on with the other one by run.name={owner}. If it is the same run under a new "
            f"name, change the name in {store.where}/{OWNER}."
        )
    with suppress(CheckpointError):  # where nothing can be written, `prepare` says so; a complete run need not
        store.write_note(OWNER, json.dumps({"name": run}) + "\n")


def find_owner(store: Store) -> str | None:
    """Name of the run that saves in the store: as written there, else in its newest good checkpoint; None: nobody's."""
    note = store.read_note(OWNER)
    if note is not None:
        try:
            return str(json.loads(note)["name"])
        except (ValueError, KeyError, TypeError):
            return None  # damaged: written anew
    for name in store.names():
        source = store.source(name)
        try:
            state = read_state(source, source.manifest())
        except CorruptCheckpointError:
            continue
        found: Any = state.get("config")
        return str(found["run"]["name"]) if isinstance(found, dict) and "run" in found else None
    return None


def check_room(store: Store, needed: int, *, frees: bool) -> None:
    """NoSpaceError unless a checkpoint of `needed` bytes can be written, with what retention may delete (`frees`)."""
    free = store.free_bytes()
    if free is None or free >= needed:
        return
    if frees:
        good = []
        for name in store.names():
            try:
                good.append(store.source(name).manifest().bytes)
            except CorruptCheckpointError:
                continue
        free += sum(good[1:])  # all but the newest
    if free < needed:
        raise NoSpaceError(
            f"{store.where} has room for {_megabytes(free)} MB, and a checkpoint of this run takes {_megabytes(needed)} MB"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"
