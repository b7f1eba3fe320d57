"""Starts the ranks of one machine, through torch elastic's API, and turns how they ended into one exit status."""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megalm.config import Config, ConfigError
from megalm.launch.run_folder import error_file, error_files, log_file


def start_local_ranks(config: Config, folder: Path, world_size: int, plan: dict[str, Any]) -> int:
    """Run `world_size` processes on this machine; returns the run's exit status.

    The ranks find each other through a file and talk over the loopback interface: no port is opened to the outside.
    Errors: ConfigError with the message of the first rank that had one.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    for stale in error_files(folder):
        stale.unlink()
    with tempfile.TemporaryDirectory(prefix="megalm-") as meeting:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=config.run.name,
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(meeting) / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            max_restarts=config.resilience.max_restarts,
            monitor_interval=0.1,
            start_method="spawn",
        )
        logging.disable(logging.ERROR)  # elastic's own words; what matters is said below
        try:
            statuses = elastic_launch(launch, _rank_process)(config, str(folder), meeting, plan)
        except ChildFailedError as error:
            return _report_failure(error, folder)
        except SignalException:
            return 130
        finally:
            logging.disable(logging.NOTSET)
    return max(statuses.values())


def _rank_process(config: Config, folder: str, meeting: str, plan: dict[str, Any]) -> int:
    from megalm.launch.worker import run_rank
    from megalm.launch.world import World

    launcher = os.getppid()
    _end_with_the_launcher()
    environment = os.environ
    world = World(int(environment["WORLD_SIZE"]), int(environment["RANK"]), int(environment["LOCAL_RANK"]))
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        status = run_rank(config, Path(folder), world, plan, meeting=Path(meeting) / f"ranks-{attempt}")
        if os.getppid() != launcher:
            os._exit(status)  # nobody is left to hand the status to, and waiting to do so would never end
        return status
    except ConfigError as error:
        error_file(Path(folder), world.rank).write_text(json.dumps(str(error)), encoding="utf-8")
        sys.exit(2)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # the run is over: nothing is left to interrupt
            signal.signal(number, signal.SIG_IGN)


def _end_with_the_launcher() -> None:
    """Let the ranks save and stop when their launcher is killed, in place of training on unseen. (Linux.)"""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _report_failure(error: ChildFailedError, folder: Path) -> int:
    if messages := error_files(folder):
        text = json.loads(messages[0].read_text(encoding="utf-8"))
        for file in messages:
            file.unlink()
        raise ConfigError(text) from None
    rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
    log = log_file(folder, rank)
    lines = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
    print(
        f"error: rank {rank} ended with exit code {failure.exitcode}"
        + (f": {lines[-1]}" if lines else "")
        + f"\nIts log is {log}. Run the same command again to go on from the newest checkpoint.",
        file=sys.stderr,
    )
    return 1
