"""How the ranks of a run find each other: within resilience.timeout_minutes, or one sentence on what is in the way."""

import os
import re
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megalm.config import Config, ConfigError
from megalm.launch.world import World

_NAMES_APPEAR = 30.0
"""Seconds that a host's name may take to be known: a cluster's name service hears of a new pod some seconds late."""


def join(config: Config, world: World, backend: str, meeting: Path | None) -> None:
    """Meet the other ranks.

    meeting: the file through which ranks of one machine find each other; None: the launcher's MASTER_ADDR and MASTER_PORT.
    Errors: ConfigError where they cannot be met, or not all of them come in time.
    """
    timeout = timedelta(minutes=config.resilience.timeout_minutes)
    if "RANK" not in os.environ:
        os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    if meeting is not None:
        dist.init_process_group(
            backend, init_method=f"file://{meeting}", rank=world.rank, world_size=world.size, timeout=timeout
        )
        return
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    deadline = time.monotonic() + timeout.total_seconds()
    _wait_for_name(os.environ["MASTER_ADDR"], min(_NAMES_APPEAR, timeout.total_seconds()))
    if world.rank > 0:
        _wait_for_rank_0(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, config)
    try:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
        _call_roll(store, world, deadline)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    except (dist.DistError, RuntimeError, OSError) as error:
        raise ConfigError(_explain(str(error), world, place, config.resilience.timeout_minutes)) from None


def _wait_for_name(host: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"MASTER_ADDR={host}: no machine of this name is known here ({error.strerror}). Set it to the name or "
                    "address of the node that rank 0 runs on."
                ) from None
        time.sleep(min(1.0, seconds / 10))


def _wait_for_rank_0(host: str, port: int, world: World, config: Config) -> None:
    """Wait until somebody listens there: torch itself would fill the screen with its stack meanwhile."""
    minutes = config.resilience.timeout_minutes
    deadline = time.monotonic() + 60 * minutes
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = str(error.strerror or error)
                raise ConfigError(_explain(reason, world, f"MASTER_ADDR={host} MASTER_PORT={port}", minutes)) from None
        time.sleep(0.2)


def _call_roll(store: dist.Store, world: World, deadline: float) -> None:
    """Wait until every rank is there, so that one that never comes is named."""
    store.set(f"here/{world.rank}", "yes")
    missing = []
    for rank in range(world.size):
        left = max(0.1, deadline - time.monotonic())
        try:
            store.wait([f"here/{rank}"], timedelta(seconds=left))
        except RuntimeError:
            missing.append(rank)
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise RuntimeError(f"missing: {shown}")


def _explain(text: str, world: World, place: str, minutes: float) -> str:
    if text.startswith("missing: "):
        what = text.removeprefix("missing: ")
        return (
            f"rank{'s' * (',' in what)} {what} of {world.size} did not come to {place} within resilience.timeout_minutes="
            f"{minutes:g}. Start all {world.size} ranks, or set WORLD_SIZE to how many there are."
        )
    if joined := re.search(r"(\d+)/\d+ clients joined", text):
        return (
            f"only {joined[1]} of {world.size} ranks came to {place} within resilience.timeout_minutes={minutes:g}. Start the "
            "others too, or set WORLD_SIZE to how many there are."
        )
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return f"{place}: another program listens on this port already. Set MASTER_PORT to a free one, the same on all nodes."
    if "permission denied" in text.lower():
        return f"{place}: this user may not open the port. Set MASTER_PORT to a free one above 1023."
    first = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return (
        f"rank {world.rank} of {world.size} could not meet the others at {place} within resilience.timeout_minutes={minutes:g}: "
        f"is rank 0 started on that node, and can it be reached from here? ({first[:160]})"
    )
