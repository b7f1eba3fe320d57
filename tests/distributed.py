"""A pool of worker processes that run one function on several gloo ranks.

    from tests.distributed import run_ranks

    def body(scale):                      # module level: workers import it by name
        tensor = torch.full((3,), float(dist.get_rank()))
        dist.all_reduce(tensor)
        return tensor * scale

    def test_sum():
        results = run_ranks(2, body, 10.0)          # [rank 0's result, rank 1's result]

Workers start once (a fork server imports torch a single time) and serve every test of the session. Each call gets a
fresh default process group, so nothing leaks from one test to the next. When a rank fails, hangs or dies, its
traceback becomes a `RankError` and the pool's processes are replaced.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

# Generous because the whole suite shares two cores with other work; a healthy call takes well under a second.
TIMEOUT_SECONDS = 180.0
# After one rank failed, how long the others may take to report before they are killed.
GRACE_SECONDS = 0.5


class RankError(AssertionError):
    """One or more ranks raised, hung or died; the message holds their tracebacks."""


def _serve(connection: Connection) -> None:
    """Worker: runs jobs until the parent closes the pipe."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        try:
            path, rank, world_size, store, timeout, payload = pickle.loads(job)
            sys.path[:] = path
            function, arguments = pickle.loads(payload)
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            message = pickle.dumps((True, function(*arguments)))
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(message)
        # Groups stay open until every rank has answered: a rank that is done would else close its sockets while a
        # slower one still connects to it. After a failure the parent kills the workers instead.
        try:
            connection.recv_bytes()
        except EOFError:
            return
        dist.destroy_process_group()


class RankPool:
    """Worker processes, started when first needed and kept until the interpreter ends."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        # The server itself never runs a parallel region, so forking from it is safe for OpenMP.
        self.context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
        self.workers: list[tuple[Any, Connection]] = []
        self.owner = os.getpid()

    def _start(self, count: int) -> None:
        while len(self.workers) < count:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def close(self) -> None:
        if os.getpid() != self.owner:
            return
        for process, connection in self.workers:
            connection.close()
            if process.is_alive():
                process.kill()
            process.join()
        self.workers.clear()

    def run(self, world_size: int, function: Callable[..., Any], arguments: tuple, timeout: float) -> list[Any]:
        self._start(world_size)
        folder = tempfile.mkdtemp(prefix="megalm-ranks-")
        payload = pickle.dumps((function, arguments))
        workers = self.workers[:world_size]
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        try:
            for rank, (_, connection) in enumerate(workers):
                job = (sys.path, rank, world_size, os.path.join(folder, "store"), timeout, payload)
                try:
                    connection.send_bytes(pickle.dumps(job))
                except (BrokenPipeError, OSError):
                    failures[rank] = "the worker process is gone"
            deadline = time.monotonic() + timeout
            waiting = {connection: rank for rank, (_, connection) in enumerate(workers) if rank not in failures}
            while waiting:
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for connection in ready:
                    rank = waiting.pop(connection)  # type: ignore[arg-type]
                    try:
                        good, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                    except (EOFError, ConnectionResetError):
                        workers[rank][0].join(1.0)
                        good, value = False, f"the process died with exit code {workers[rank][0].exitcode}"
                    if good:
                        results[rank] = value
                    else:
                        failures[rank] = value
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if len(results) == world_size:
                for _, connection in workers:
                    connection.send_bytes(b"close")
            for rank in waiting.values():
                failures[rank] = "no answer: still waiting for the other ranks" if failures else f"hung for {timeout} s"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if len(results) != world_size:
                self.close()
        if failures:
            raise RankError(
                "\n".join(f"--- rank {rank} of {world_size}\n{failures[rank]}" for rank in sorted(failures))
            )
        return [results[rank] for rank in range(world_size)]


_POOL: RankPool | None = None


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """Run `function(*args)` on `world_size` gloo ranks; returns each rank's result, in rank order.

    `function` and `args` are pickled, so the function must be at a module's top level; so are the results (return
    tensors, not modules).
    Raises RankError with every failed rank's traceback.
    """
    global _POOL
    if _POOL is None or _POOL.owner != os.getpid():
        _POOL = RankPool()
        atexit.register(_POOL.close)
    return _POOL.run(world_size, function, args, timeout)
