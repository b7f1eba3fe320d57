"""One rank of a run: joins the others, builds the trainer, attaches the hooks, trains."""

import logging
import logging.handlers
import os
import platform
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megalm import __version__, ops
from megalm.config import Config, ConfigError
from megalm.guard.hook import GuardHook
from megalm.launch.hold import hold_run
from megalm.launch.lock import Holder
from megalm.launch.meeting import join
from megalm.launch.run_folder import log_file, make_run_folder
from megalm.launch.world import World, device_type
from megalm.observe.bystander import Bystander
from megalm.observe.comparison import ComparisonHook, PeakMemory
from megalm.observe.console import ConsoleHook
from megalm.observe.metrics import MetricsWriter
from megalm.observe.record import RecordHook
from megalm.observe.report import ReportHook
from megalm.observe.sample import SampleHook
from megalm.observe.tensorboard import TensorBoardHook
from megalm.ops.backend import library
from megalm.parallel.mesh import build_mesh, local_device
from megalm.plan.machine import machine_for
from megalm.resilience.chaos.provoke import provoke_hooks
from megalm.train.hooks import Hook
from megalm.train.trainer import Trainer

log = logging.getLogger("megalm")


def run_rank(config: Config, folder: Path, world: World, plan: dict[str, Any], *, meeting: Path | None = None) -> int:
    """Train on this rank; returns the exit status.

    plan: what plan.json is to hold.
    meeting: file through which local ranks find each other; None: the launcher's MASTER_ADDR and MASTER_PORT.
    """
    make_run_folder(folder)
    handler = RankLog(log_file(folder, world.rank))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    damage, shown = logging.getLogger("megalm.journal.lines"), logging.StreamHandler()
    if world.rank == 0:  # what is wrong with a file of the run, its owner reads on the screen too
        damage.addHandler(shown)
    try:
        return _run(config, folder, world, plan, meeting, handler)
    except ConfigError:
        raise
    except BaseException:
        log.exception("rank %d stopped", world.rank)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        damage.removeHandler(shown)
        log.removeHandler(handler)
        handler.close()


def _run(
    config: Config, folder: Path, world: World, plan: dict[str, Any], meeting: Path | None, rank_log: "RankLog"
) -> int:
    kind = device_type(config)
    log.info("megalm %s, torch %s, python %s, rank %d of %d on %s", __version__, torch.__version__,
             platform.python_version(), world.rank, world.size, kind)  # fmt: skip
    ops.set_backend(config.ops.backend)
    if kind == "cuda":
        torch.cuda.set_device(local_device(kind, world.local_rank))
    else:
        ops.keep_freed_memory()
    if world.size > 1 or world.external:
        join(config, world, "nccl" if kind == "cuda" else "gloo", meeting)
    with hold_run(config, folder, world) as former:
        return _train(config, folder, world, plan, rank_log, former)


def _train(
    config: Config, folder: Path, world: World, plan: dict[str, Any], rank_log: "RankLog", former: list[Holder]
) -> int:
    kind = device_type(config)
    mesh = build_mesh(config.parallel, kind, _timeout(config))
    memory = PeakMemory(kind)
    trainer = Trainer(config, mesh, folder, peak_flops=machine_for(config).peak(config.precision.dtype))
    trainer.environment = _environment(config, world, kind)
    if former:
        trainer.environment["took_over"] = [holder.describe() for holder in former]
    trainer.hooks += [rank_log.hook, *_hooks(config, folder, trainer, plan, memory)]
    previous = {number: signal.signal(number, _stopper(trainer)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = trainer.train()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    log.info("ended with status %d at step %d", status, trainer.step)
    if trainer.reason is not None and trainer.is_writer:
        print(f"error: {trainer.reason}", file=sys.stderr)
    return status


class RankLog(logging.handlers.MemoryHandler):
    """logs/rank-N.log. Lines wait in memory until the run trains (`hook`), or something is wrong: a start that does not come
    to train leaves the folder as it was."""

    def __init__(self, path: Path) -> None:
        file = logging.FileHandler(path, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        super().__init__(1000, flushLevel=logging.WARNING, target=file, flushOnClose=False)
        self.hook = _Opening(self)

    def open(self) -> None:
        """From now on each line is written at once."""
        self.capacity = 0
        self.flush()

    def close(self) -> None:
        file = self.target
        super().close()
        if file is not None:
            file.close()


class _Opening(Hook):
    def __init__(self, rank_log: RankLog) -> None:
        self.rank_log = rank_log

    def on_train_start(self, trainer: Trainer) -> None:
        self.rank_log.open()


def _timeout(config: Config) -> timedelta:
    return timedelta(minutes=config.resilience.timeout_minutes)


def _hooks(config: Config, folder: Path, trainer: Trainer, plan: dict[str, Any], memory: PeakMemory) -> list[Hook]:
    """What attaches to the run; only rank 0 speaks and writes."""
    console = Console(soft_wrap=not sys.stdout.isatty()) if trainer.is_writer else None
    hooks: list[Hook] = [GuardHook(config.guard), *provoke_hooks(config.guard)]
    if console is not None:
        voice = ConsoleHook(console, config.train.log_every)
        trainer.events.listeners.append(voice.tell)
        comparison = ComparisonHook(folder, console, memory)
        hooks += [RecordHook(folder, plan), MetricsWriter(folder / "metrics.jsonl")]
        hooks += [Bystander(voice), Bystander(comparison)]
        if config.tracking.tensorboard:
            hooks.append(Bystander(TensorBoardHook(folder / "tensorboard")))
    if config.train.sample and config.train.sample_tokens:
        hooks.append(SampleHook(folder, console))
    if console is not None and config.tracking.report:
        hooks.append(Bystander(ReportHook(folder)))
    return hooks


def _stopper(trainer: Trainer):
    """Signal handler: the run ends after the step under way, with a checkpoint."""

    def stop(number: int, frame: object) -> None:
        log.info("signal %d: stopping after this step", number)
        trainer.stop_requested = True

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
        "kernels": library() is not None,
    }
