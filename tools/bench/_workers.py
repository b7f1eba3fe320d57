"""Local gloo ranks for benchmarks: start a world, run one function on every rank, collect what it returns."""

import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")


def _rank(pipe: Connection, rank: int, size: int, store: str, minutes: float, function: Callable, arguments: tuple):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if size > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, size),
                rank=rank,
                world_size=size,
                timeout=timedelta(minutes=minutes),
            )
        for result in function(*arguments):
            pipe.send((True, result))
        pipe.send((True, None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        if size > 1 and dist.is_initialized():
            dist.destroy_process_group()
        pipe.close()


def run_world(
    size: int, function: Callable[..., Any], *arguments: Any, receive: Callable[[list], None], minutes: float = 5.0
) -> None:
    """Run a generator function on `size` new gloo ranks; each time all of them have yielded, `receive` gets the values.

    One rank runs without any process group. Errors: RuntimeError with the tracebacks of the ranks that failed, after
    all ranks were ended.
    """
    _CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "megalm.train.trainer"])
    folder = Path(tempfile.mkdtemp(prefix="megalm-bench-"))
    pipes: list[Connection] = []
    processes = []
    try:
        for rank in range(size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_rank, args=(there, rank, size, str(folder / "store"), minutes, function, arguments), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        while True:
            values = _one_round(pipes, minutes * 60)
            if all(value is None for value in values):
                return
            receive(values)
    finally:
        for process in processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _one_round(pipes: list[Connection], timeout: float) -> list[Any]:
    values: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = set(range(len(pipes)))
    while waiting:
        ready = wait([pipes[rank] for rank in waiting], timeout=timeout)
        if not ready:
            break
        for rank in [rank for rank in waiting if pipes[rank] in ready]:
            waiting.remove(rank)
            try:
                good, value = pipes[rank].recv()
            except (EOFError, ConnectionResetError):
                good, value = False, "the process ended without an answer\n"
            if good:
                values[rank] = value
            else:
                failures[rank] = value
        if failures:
            timeout = 1.0  # the others wait for the rank that failed
    if failures or waiting:
        said = [f"--- rank {rank}\n{failures[rank]}" for rank in sorted(failures)]
        said += [f"--- rank {rank}: no answer" for rank in sorted(waiting)]
        raise RuntimeError("\n".join(said))
    return [values[rank] for rank in range(len(pipes))]
