"""One rank of a run: joins the others, builds the trainer, attaches the hooks, trains."""

import logging
import os
import platform
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm import __version__, ops
from megalm.config import Config, ConfigError
from megalm.config.plugins import load_plugins
from megalm.launch.attach import list_hooks
from megalm.launch.forkserver import SIGNALS
from megalm.launch.hold import hold_run
from megalm.launch.meeting import join
from megalm.launch.rank_log import RankLog
from megalm.launch.run_folder import log_file, make_run_folder
from megalm.launch.world import World, choose_device_type
from megalm.observe.comparison import PeakMemory
from megalm.ops.backend import find_library
from megalm.parallel.mesh import build_mesh, choose_local_device
from megalm.plan.machine import find_machine
from megalm.posttrain.source import open_source
from megalm.resilience.chaos.faults import Occasion, add_faults, find_attempt
from megalm.resilience.chaos.provoke import provoke_source
from megalm.resilience.pulse import RankPulse
from megalm.resilience.restarted import Restart, TellRestart
from megalm.train.hooks import Hook
from megalm.train.parts import build_trainer
from megalm.train.pulse import Pulse
from megalm.train.trainer import Trainer

log = logging.getLogger("megalm")


@dataclass(frozen=True)
class Supervised:
    """What a rank has of the supervisor that started it."""

    meeting: Path
    """File through which the ranks of this machine find each other."""
    pulse: RankPulse
    restart: Restart | None
    """What was before, where the ranks were started again."""
    took_over: tuple[str, ...]
    """The dead holders of the run's locks, which the supervisor holds now."""


def run_rank(
    config: Config, folder: Path, world: World, plan: dict[str, Any], supervised: Supervised | None = None
) -> int:
    """Train on this rank; returns the exit status.

    plan: what plan.json is to hold. supervised: None where another launcher started this process, which then gives
    MASTER_ADDR and MASTER_PORT.
    """
    make_run_folder(folder)
    handler = RankLog(log_file(folder, world.rank))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    damage, shown = logging.getLogger("megalm.journal.lines"), logging.StreamHandler()
    if world.rank == 0:  # what is wrong with a file of the run, its owner reads on the screen too
        damage.addHandler(shown)
    pulse = _choose_pulse(config, world, supervised)
    try:
        pulse.enter("start")
        load_plugins(config.run.plugins)
        return _run(config, folder, world, plan, supervised, handler, pulse)
    except ConfigError as error:
        pulse.fail(error)
        raise
    except BaseException as error:
        pulse.fail(error)
        log.exception("rank %d stopped", world.rank)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        damage.removeHandler(shown)
        log.removeHandler(handler)
        handler.close()


def _choose_pulse(config: Config, world: World, supervised: Supervised | None) -> Pulse:
    """Choose where this rank says what it is at: to its supervisor, and to the faults that are to strike it."""
    if supervised is None:
        return add_faults(Pulse(), config.resilience.chaos, world.rank, world.size, Occasion(find_attempt(os.environ)))
    restart = supervised.restart
    occasion = Occasion(restart.attempt, restart.furthest) if restart else Occasion()
    return add_faults(supervised.pulse, config.resilience.chaos, world.rank, world.size, occasion, world.local_rank)


def _run(
    config: Config,
    folder: Path,
    world: World,
    plan: dict[str, Any],
    supervised: Supervised | None,
    rank_log: RankLog,
    pulse: Pulse,
) -> int:
    kind = choose_device_type(config)
    log.info("megalm %s, torch %s, python %s, rank %d of %d on %s", __version__, torch.__version__,
             platform.python_version(), world.rank, world.size, kind)  # fmt: skip
    ops.set_backend(config.ops.backend)
    if kind == "cuda":
        torch.cuda.set_device(choose_local_device(kind, world.local_rank))
    else:
        ops.keep_freed_memory()
    if world.size > 1 or world.external:
        pulse.enter("join")
        join(config, world, "nccl" if kind == "cuda" else "gloo", supervised.meeting if supervised else None)
    if supervised is not None:
        return _train(config, folder, world, plan, rank_log, pulse, supervised.took_over, supervised)
    with hold_run(config, folder, world) as held:
        former = tuple(holder.describe() for holder in held.former)
        return _train(config, folder, world, plan, rank_log, pulse, former)


def _train(
    config: Config,
    folder: Path,
    world: World,
    plan: dict[str, Any],
    rank_log: RankLog,
    pulse: Pulse,
    former: tuple[str, ...],
    supervised: Supervised | None = None,
) -> int:
    pulse.enter("load")
    kind = choose_device_type(config)
    mesh = build_mesh(config.parallel, kind, _timeout(config))
    memory = PeakMemory(kind)
    environment = _environment(config, world, kind)
    if former:
        environment["took_over"] = list(former)
    opened = open_source(config, mesh, folder)
    trainer = build_trainer(
        config,
        mesh,
        folder,
        batch_source=provoke_source(config, opened.source, mesh),
        hooks=list_hooks(
            config,
            folder,
            plan,
            memory,
            rank_log,
            _told_by(supervised),
            opened.preparing,
            opened.watching,
            writer=mesh.rank == 0,
        ),
        peak_flops=find_machine(config).peak(config.precision.dtype),
        environment=environment,
        pulse=pulse,
    )
    heard = SIGNALS if supervised is None else (signal.SIGTERM,)
    previous = {number: signal.signal(number, _stopper(trainer)) for number in heard}
    try:
        status = trainer.train()
        pulse.finish(status)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    log.info("ended with status %d at step %d", status, trainer.step)
    if trainer.control.reason is not None and trainer.is_writer:
        print(f"error: {trainer.control.reason}", file=sys.stderr)
    return status


def _told_by(supervised: Supervised | None) -> list[Hook]:
    return [] if supervised is None else [TellRestart(supervised.pulse, supervised.restart)]


def _timeout(config: Config) -> timedelta:
    return timedelta(minutes=config.resilience.timeout_minutes)


def _stopper(trainer: Trainer):
    """Make a signal's handler: it ends the run after the step under way, with a checkpoint."""

    def stop(number: int, frame: object) -> None:
        log.info("signal %d: stopping after this step", number)
        trainer.control.request_stop()

    return stop


def _environment(config: Config, world: World, kind: str) -> dict[str, object]:
    return {
        "megalm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": kind,
        "world_size": world.size,
        "ops": config.ops.backend,
        "kernels": find_library() is not None,
    }
