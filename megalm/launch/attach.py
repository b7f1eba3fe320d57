"""What attaches to a run, in one list: a hook's place in it has a reason, which stands beside it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megalm.config import Config
from megalm.evaluate.hook import SuiteHook
from megalm.guard.fp8 import Fp8Hook
from megalm.guard.hook import GuardHook
from megalm.guard.router import RouterHook
from megalm.launch.rank_log import OpenRankLog, RankLog
from megalm.observe.bystander import Bystander
from megalm.observe.comparison import ComparisonHook, PeakMemory
from megalm.observe.console import ConsoleHook
from megalm.observe.metrics import MetricsWriter
from megalm.observe.record import RecordHook
from megalm.observe.report import ReportHook
from megalm.observe.sample import SampleHook
from megalm.observe.trackers.registry import TRACKERS
from megalm.observe.trackers.tensorboard import TensorBoard
from megalm.observe.trackers.tracker import TrackerHook
from megalm.resilience.chaos.provoke import make_provoke_hooks
from megalm.train.hook_registry import build_registered_hooks
from megalm.train.hooks import Hook


def list_hooks(
    config: Config,
    folder: Path,
    plan: dict[str, Any],
    memory: PeakMemory,
    rank_log: RankLog,
    tellers: Sequence[Hook] = (),
    preparing: Sequence[Hook] = (),
    watching: Sequence[Hook] = (),
    *,
    writer: bool,
) -> list[Hook]:
    """List the hooks of a run on this rank, in the order in which they are asked.

    tellers: write what the supervisor of this machine knows. writer: this is rank 0, which alone speaks and writes.
    preparing: complete the data before any batch is asked for. watching: look at what batches were like.
    memory: counts from before the run was built.
    """
    trackers = [TRACKERS.find(name)(config, folder) for name in config.tracking.trackers]  # on every rank: see there
    console = Console(soft_wrap=not sys.stdout.isatty()) if writer else None
    watched = config.guard.enabled and config.guard.router_patience and config.model.moe.num_experts
    hooks: list[Hook] = [
        OpenRankLog(rank_log),  # first: what the others have to say when the run begins is in the log
        *preparing,  # before those that ask for batches when the run begins
        GuardHook(config.guard),  # before all that shows a step: it goes back and takes snapshots at a step's end
        *watching,  # before those that show its events
        *([RouterHook(config.guard, config.model.moe)] if watched else []),  # likewise
        *([Fp8Hook(config.precision.fp8.measure_every)] if config.precision.fp8.recipe != "none" else []),  # likewise
        *make_provoke_hooks(
            config.guard
        ),  # behind the guard: what it damages at a step's start, no snapshot of that start has
    ]
    if (
        config.evaluate.every
    ):  # on every rank; behind the guard, and before what writes a step's record, where its figures go
        hooks.append(SuiteHook(config, folder, console))
    hooks += build_registered_hooks(config, folder)  # a plugin's: on every rank, and where a suite of tasks stands too
    if console is not None:
        hooks += [
            RecordHook(folder, plan),  # the settings are on disk before the first line of the steps made with them
            MetricsWriter(folder / "metrics.jsonl"),  # before all that reads its file when a step ends
            Bystander(ConsoleHook(console, config.train.log_every)),  # a step on the screen is in the file
            Bystander(ComparisonHook(folder, console, memory)),  # below the console's picture, above the sample
        ]
        if config.tracking.tensorboard:
            hooks.append(Bystander(TrackerHook(TensorBoard(folder / "tensorboard"))))  # reads metrics.jsonl
        hooks += tellers  # below those who show it: all are ready when the first event comes
    if config.train.sample and config.train.sample_tokens:
        hooks.append(SampleHook(folder, console))  # on every rank: the tensor ranks write together
    if console is not None and config.tracking.report:
        hooks.append(Bystander(ReportHook(folder)))  # it holds what all the others wrote
    if console is not None:
        hooks += [Bystander(TrackerHook(tracker)) for tracker in trackers]  # last: they keep the report, too
    return hooks
