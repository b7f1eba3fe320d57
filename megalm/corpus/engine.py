"""Where the stages of the data tools run: a local pool, Spark or Ray.

A stage is a pure function of a task: the task names its input and its number, the function leaves its output in files
of that number and returns something small. So the engine decides nothing: it maps, in any order, and a task whose
worker died is done again. Spark and Ray on several machines need the same files at the same paths on all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megalm.config.errors import ConfigError, explain_full_disk

if TYPE_CHECKING:  # a pool's modules take longer to import than a small job takes
    from concurrent.futures import ProcessPoolExecutor

ENGINES = ("local", "spark", "ray")
ATTEMPTS = 3  # of a task whose worker dies
WAVE = 16  # tasks a worker in one Spark job: results come back after each job
PACKAGES = str(Path(__file__).parents[2])  # where megalm is imported from

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Failed:
    """A ConfigError on its way back: every engine would wrap the exception in its own way."""

    message: str


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except ConfigError as error:
        return _Failed(str(error))
    except OSError as error:
        explained = explain_full_disk(error)
        if explained is None:
            raise
        return _Failed(str(explained))


def _checked(result: Any) -> Any:
    if isinstance(result, _Failed):
        raise ConfigError(result.message)
    return result


def _labels(tasks: Sequence[Any]) -> str:
    return ", ".join(sorted({str(getattr(task, "label", "a task of this stage")) for task in tasks[:4]}))


class Engine:
    """Maps functions over tasks. Functions are of modules, tasks and results can be pickled."""

    name = ""

    def __init__(self, workers: int):
        self.workers = max(workers, 1)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results as they come, each once. Tasks are asked for when a worker will soon be free for them.

        Errors: ConfigError as a task raised it, or if a task's workers die again and again.
        """
        raise NotImplementedError

    def prepare(self, module: str) -> None:
        """Workers may start now and import this module while the caller does something else."""

    def close(self) -> None:
        """Ends what was started."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class LocalEngine(Engine):
    """A pool of processes of this machine; one worker, or one task, needs none."""

    name = "local"

    def __init__(self, workers: int):
        super().__init__(workers)
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, module: str) -> None:
        if self.workers > 1:
            for _ in range(self.workers):
                self._running().submit(_import, module)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        queue = iter(tasks)
        first = list(itertools.islice(queue, 2))
        queue = itertools.chain(first, queue)
        if self.workers == 1 or (len(first) <= 1 and self._pool is None):
            yield from (_checked(_call(function, task)) for task in queue)
            return
        from concurrent.futures.process import BrokenProcessPool

        begun: dict[int, Task] = {}  # and not done
        numbered, deaths = enumerate(queue), 0
        while True:
            try:
                for number, result in self._pooled(function, begun, numbered):
                    del begun[number]
                    deaths = 0
                    yield _checked(result)
                return
            except BrokenProcessPool as error:
                self._drop()
                deaths += 1
                if deaths == ATTEMPTS:
                    raise ConfigError(
                        f"a worker process was killed {ATTEMPTS} times, at {_labels(list(begun.values()))}. The machine may "
                        "be out of memory: pass fewer --workers; what is done is kept, and the same command goes on from "
                        "there."
                    ) from error

    def _pooled(
        self, function: Callable[[Task], Result], begun: dict[int, Task], more: Iterator[tuple[int, Task]]
    ) -> Iterator[tuple[int, Any]]:
        """(number, result) of the tasks that had begun, and of more; each is among the begun ones until it is taken."""
        from concurrent.futures import FIRST_COMPLETED, wait

        queue = itertools.chain(list(begun.items()), more)
        running: dict[Any, int] = {}
        try:
            while True:
                for number, task in itertools.islice(queue, 2 * self.workers - len(running)):
                    begun[number] = task
                    running[self._running().submit(_call, function, task)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BaseException:
            self._drop()
            raise

    def _running(self) -> ProcessPoolExecutor:
        if self._pool is None:
            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=_alone)
        return self._pool

    def _drop(self) -> None:
        """Ends the workers at once: a task leaves whole files or none, and nobody waits for what they do now."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        self._drop()


def _alone() -> None:
    """A worker: one of many processes, that leaves Ctrl-C to the one that started it and ends with that."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _import(module: str) -> None:
    importlib.import_module(module)


class SparkEngine(Engine):
    """Spark: the session that spark-submit gives, the master at `address`, or one on this machine."""

    name = "spark"

    def __init__(self, workers: int, address: str | None = None):
        super().__init__(workers)
        try:
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise ConfigError(
                "--engine spark needs pyspark and Java 17 or later: `pip install pyspark`, and a JRE of your system."
            ) from error
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = SparkSession.builder.appName("megalm").config("spark.ui.showConsoleProgress", "false")
        builder = builder.config("spark.executorEnv.TOKENIZERS_PARALLELISM", "false")
        if "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit sets it, and has its own settings
            paths = os.pathsep.join(filter(None, (PACKAGES, os.environ.get("PYTHONPATH"))))
            builder = builder.master(address or f"local[{self.workers},{ATTEMPTS + 1}]")
            builder = builder.config("spark.executorEnv.PYTHONPATH", paths).config("spark.ui.enabled", "false")
            # the driver only hands tasks on: compiling its code well would take longer than running it
            builder = builder.config("spark.driver.extraJavaOptions", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
        try:
            self._session = builder.getOrCreate()
        except Exception as error:  # pyspark's gateway raises several kinds
            raise ConfigError(
                f"Spark does not start ({error}). It needs Java 17 or later on the PATH or in JAVA_HOME"
                + (f", and a master at {address!r} that can be reached." if address else ".")
            ) from error
        context = self._session.sparkContext
        context.setLogLevel("OFF" if "PYSPARK_GATEWAY_PORT" not in os.environ else "WARN")
        self.workers = max(context.defaultParallelism, 1)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        context, queue = self._session.sparkContext, iter(tasks)
        while wave := list(itertools.islice(queue, WAVE * self.workers)):
            try:
                results = context.parallelize(wave, len(wave)).map(partial(_call, function)).collect()
            except Exception as error:  # Py4JJavaError: a task failed in all its attempts
                reason = str(getattr(error, "java_exception", error)).strip().splitlines()
                raise ConfigError(
                    f"Spark gave up at {_labels(wave)}: {reason[0] if reason else error}. What is done is kept, and the "
                    "same command goes on from there."
                ) from error
            yield from map(_checked, results)

    def close(self) -> None:
        self._session.stop()


class RayEngine(Engine):
    """Ray tasks on the cluster at `address`, or on one of this machine."""

    name = "ray"

    def __init__(self, workers: int, address: str | None = None):
        super().__init__(workers)
        try:
            import ray
        except ImportError as error:
            raise ConfigError("--engine ray needs Ray: `pip install ray`.") from error
        self._ray = ray
        import logging

        environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": PACKAGES}}
        options: dict[str, Any] = {"address": address} if address else {"num_cpus": self.workers, "address": "local"}
        if not address:  # results are small: the least that Ray takes
            options |= {"object_store_memory": 80 << 20, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment, **options)
        except Exception as error:
            raise ConfigError(
                f"Ray does not start ({error})." + (f" Is there a cluster at {address!r}?" if address else "")
            ) from error
        if address:
            self.workers = max(int(ray.cluster_resources().get("CPU", 1)), 1)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        remote = self._ray.remote(max_retries=ATTEMPTS, num_cpus=1)(_call)
        queue = iter(tasks)
        running: dict[Any, Task] = {}
        while True:
            for task in itertools.islice(queue, 4 * self.workers - len(running)):
                running[remote.remote(function, task)] = task
            if not running:
                return
            finished, _ = self._ray.wait(list(running))
            for reference in finished:
                task = running.pop(reference)
                try:
                    result = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    raise ConfigError(
                        f"Ray gave up at {_labels([task])}: {reason}. What is done is kept, and the same command goes on "
                        "from there."
                    ) from error
                yield _checked(result)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._ray.shutdown()


def make_engine(name: str = "local", workers: int = 1, address: str | None = None) -> Engine:
    """Make the engine of that name; `address` is Spark's master or Ray's cluster, None one of this machine.

    Errors: ConfigError if it is unknown, not installed, or does not start.
    """
    if name == "local":
        if address:
            raise ConfigError(f"--engine-address {address} is for --engine spark or ray; the local pool has none.")
        return LocalEngine(workers)
    if name == "spark":
        return SparkEngine(workers, address)
    if name == "ray":
        return RayEngine(workers, address)
    raise ConfigError(f"--engine is {name!r}: choose one of {', '.join(ENGINES)}.")
