"""A save of two ranks, interrupted at every file operation it makes, in every way that an operation can go wrong.

    python -m tools.bench.checkpoint._crash_points [--sample N] [--seed N]

Two gloo ranks save step 1, then step 2 under the preload library of fault.c, once for each (rank, operation, fault). Then:
  - what is on the disk must load as exactly step 1 or exactly step 2, bit by bit, on one rank (another layout);
  - if any rank was told that step 2 is durable, it must be step 2;
  - no rank may hang, and every rank must end as it should: killed, or told of the failure as a CheckpointError;
  - where the process survives the fault, its next save must succeed;
  - the next process must sweep up what was left and save again.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).with_name("fault.c")
DEADLY = ("kill", "torn", "power")
HANG_SECONDS = 60.0
DURABLE, TOLD, WRONG = 0, 3, 1  # exit statuses of a rank


@dataclass(frozen=True)
class Point:
    """One fault: which rank, at its how-manieth operation, and what goes wrong."""

    rank: int
    number: int
    operation: str
    fault: str


@dataclass
class Report:
    """What an enumeration found."""

    points: int
    recovered: int
    operations: dict[str, int]
    """How often each kind of operation occurs in one save, both ranks together."""
    faults: dict[str, int]
    found_old: int
    """Points after which the disk held step 1."""
    found_new: int
    failures: list[str]
    seconds: float
    sampled: bool


def enumerate_crashes(
    sample: int | None = None,
    seed: int = 0,
    *,
    fault: str | None = None,
    operation: str | None = None,
    quiet: bool = True,
    without_fsync: bool = False,
    jobs: int = 1,
) -> Report:
    """Run the enumeration in processes of their own that have the library preloaded.

    `sample`: that many points only; `fault`, `operation`: only those; `jobs`: so many processes share the points.
    """
    # The faults are made, not waited for, so the files may as well be in memory, where an fsync costs nothing.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="crash-", dir=memory) as folder:
        library = Path(folder) / "fault.so"
        build = [
            "gcc",
            "-O1",
            "-shared",
            "-fPIC",
            "-Wno-unused-result",
            "-o",
            str(library),
            str(SOURCE),
            "-ldl",
            "-lpthread",
        ]
        subprocess.run(build, check=True)
        command = [sys.executable, "-m", "tools.bench.checkpoint._crash_points", "--seed", str(seed)]
        command += ["--sample", str(sample)] if sample is not None else []
        command += ["--fault", fault] if fault else []
        command += ["--operation", operation] if operation else []
        command += ["--quiet"] * quiet + ["--without-fsync"] * without_fsync
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        root = Path(__file__).resolve().parents[3]
        processes = []
        for job in range(jobs):
            own = Path(folder) / f"job-{job}"
            own.mkdir()
            part = [*command, "--folder", str(own), "--library", str(library), "--part", f"{job}/{jobs}"]
            processes.append(subprocess.Popen(part, cwd=root, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError(f"the enumeration ended with {[process.returncode for process in processes]}")
        return merge_reports([Report(**json.loads(output.splitlines()[-1])) for output in outputs])


def merge_reports(reports: list[Report]) -> Report:
    """One report of several processes' parts."""
    return Report(
        points=sum(r.points for r in reports),
        recovered=sum(r.recovered for r in reports),
        operations=reports[0].operations,
        faults=dict(sorted(sum((Counter(r.faults) for r in reports), Counter()).items())),
        found_old=sum(r.found_old for r in reports),
        found_new=sum(r.found_new for r in reports),
        failures=[failure for r in reports for failure in r.failures],
        seconds=max(r.seconds for r in reports),
        sampled=reports[0].sampled,
    )


def list_applicable(operation: str) -> list[str]:
    """List the faults that an operation can suffer."""
    faults = ["kill", "power", "eio"]
    if operation in ("create", "write", "fsync", "fsync-folder", "mkdir", "rename"):
        faults.append("enospc")
    if operation == "write":
        faults += ["torn", "short"]
    return faults


class Enumeration:
    """Runs inside the preloaded process; forks two ranks for each point (torch is imported once)."""

    def __init__(self, folder: Path, library: Path, without_fsync: bool) -> None:
        import torch

        from megalm.checkpoint import commit

        torch.set_num_threads(1)
        commit.WRITE_BYTES = 8192  # so that even this small model's files take several writes
        if without_fsync:
            commit.os = SimpleNamespace(**{**vars(os), "fsync": lambda descriptor: None})  # type: ignore[assignment]
        self.folder = folder
        self.library = ctypes.CDLL(str(library))
        self.library.fault_trace.restype = ctypes.c_char_p
        self.trials = 0

    def points(self) -> list[Point]:
        """Every point of a save, from a run that only counts."""
        scratch = self._scratch()
        statuses = self._run(scratch, None)
        if statuses != [DURABLE, DURABLE]:
            raise RuntimeError(f"a save without any fault ended with {statuses}")
        found = []
        for rank in (0, 1):
            lines = (scratch / f"trace-{rank}").read_text().splitlines()
            for number, line in enumerate(lines, start=1):
                operation = line.partition(" ")[0]
                found += [Point(rank, number, operation, fault) for fault in list_applicable(operation)]
        shutil.rmtree(scratch)
        return found

    def trial(self, point: Point) -> int:
        """One interrupted save; returns the step found on the disk. AssertionError if anything is not as it must be."""
        scratch = self._scratch()
        statuses = self._run(scratch, point)
        at_fault, other = statuses[point.rank], statuses[1 - point.rank]
        if point.fault in DEADLY:
            assert at_fault == -signal.SIGKILL, f"rank {point.rank} ended with {at_fault}, not killed"
            assert other in (DURABLE, TOLD), f"the other rank ended with {other}"
            step = recover(scratch / "root")
        else:
            assert at_fault == other and at_fault in (DURABLE, TOLD), f"ranks ended with {statuses}"
            assert recover(scratch / "root") == 3, "the save after the fault is not there"
            step = int((scratch / "found").read_text())
        assert not (DURABLE in statuses and step != 2), f"a rank was told that step 2 is durable; {step} was found"
        save_again(scratch / "root")
        shutil.rmtree(scratch)
        return step

    def _scratch(self) -> Path:
        self.trials += 1
        scratch = self.folder / f"trial-{self.trials}"
        scratch.mkdir()
        return scratch

    def _run(self, scratch: Path, point: Point | None) -> list[int]:
        """Exit statuses of both ranks (a signal as a negative number)."""
        children = []
        for rank in (0, 1):
            child = os.fork()
            if child == 0:
                status = WRONG
                try:
                    status = self._rank(rank, scratch, point)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
        ended: dict[int, int] = {}
        deadline = time.monotonic() + HANG_SECONDS
        while len(ended) < 2:
            for child in children:
                if child not in ended:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        ended[child] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                for child in children:
                    if child not in ended:
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                raise AssertionError(f"a rank hung for {HANG_SECONDS:.0f} s")
            time.sleep(0.002)
        return [ended[child] for child in children]

    def _rank(self, rank: int, scratch: Path, point: Point | None) -> int:
        import torch.distributed as dist

        from megalm.checkpoint.checkpointer import Checkpointer
        from megalm.checkpoint.errors import CheckpointError
        from megalm.config import CheckpointConfig

        from ._fake_ranks import FakeMesh, list_boxes_of_rank

        root = scratch / "root"
        dist.init_process_group("gloo", store=dist.FileStore(str(scratch / "store"), 2), rank=rank, world_size=2)
        events: list[str] = []
        made = Checkpointer(
            root, CheckpointConfig(keep=1), FakeMesh(_layout()), events=lambda kind, **fields: events.append(kind)
        )
        made.save(1, list_boxes_of_rank(_layout(), rank, values_of(1)), {"step": 1}, {"rank": rank}, wait=True)
        if point is None or point.rank == rank:
            number, fault = (point.number, point.fault) if point else (0, "none")
            self.library.fault_arm(str(root).encode(), number, fault.encode())
        status = DURABLE
        try:
            made.save(2, list_boxes_of_rank(_layout(), rank, values_of(2)), {"step": 2}, {"rank": rank})
            made.wait()
        except CheckpointError:
            status = TOLD
            if rank == 0 and events[-1] != "checkpoint_failed":
                raise AssertionError(f"no event tells of the failure: {events}") from None
        if point is None:
            (scratch / f"trace-{rank}").write_bytes(self.library.fault_trace())
        self.library.fault_disarm()
        if point is not None and point.fault not in DEADLY:
            dist.barrier()
            if rank == 0:
                (scratch / "found").write_text(str(recover(root)))
            dist.barrier()
            made.save(3, list_boxes_of_rank(_layout(), rank, values_of(3)), {"step": 3}, {"rank": rank}, wait=True)
        return status


def _layout():
    from ._fake_ranks import Layout

    return Layout(data=2, zero=True)


def values_of(step: int):
    """The whole state of a step: the fakes' small tensors. Large enough a share of it is bits, so no two steps agree."""
    from ._fake_ranks import reference

    return reference(seed=step)


def recover(root: Path) -> int:
    """What a fresh process finds: the step whose state it is, bit by bit."""
    from megalm.checkpoint.checkpointer import Checkpointer
    from megalm.config import CheckpointConfig

    from ._fake_ranks import FakeMesh, Layout, assert_holds, list_boxes_of_rank

    made = Checkpointer(root, CheckpointConfig(keep=1), FakeMesh(Layout()))
    boxes = list_boxes_of_rank(Layout(), 0, None)
    state, _ = made.load(boxes)
    assert_holds(boxes, values_of(state["step"]))
    latest = made.latest()
    assert latest is not None and Path(latest).name.startswith(f"step-{state['step']:08d}"), latest
    return state["step"]


def save_again(root: Path) -> None:
    """The next process saves, and leaves nothing lying about."""
    from megalm.checkpoint.checkpointer import Checkpointer
    from megalm.config import CheckpointConfig

    from ._fake_ranks import FakeMesh, Layout, list_boxes_of_rank

    made = Checkpointer(root, CheckpointConfig(keep=1), FakeMesh(Layout()))
    made.save(9, list_boxes_of_rank(Layout(), 0, values_of(9)), {"step": 9}, {}, wait=True)
    made.close()
    assert os.listdir(root) == ["step-00000009"], os.listdir(root)
    assert recover(root) == 9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="that many points, chosen evenly; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", help="only this fault (kill, power, eio, enospc, torn, short)")
    parser.add_argument("--operation", help="only at this operation (write, fsync, rename, ...)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the points (default 1)")
    for name, kind in (("--folder", Path), ("--library", Path), ("--part", str)):  # of one such process
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--without-fsync", action="store_true", help="save without fsync, to see that the enumeration finds it out"
    )
    options = parser.parse_args(argv)
    if options.folder is None:
        report = enumerate_crashes(
            options.sample,
            options.seed,
            fault=options.fault,
            operation=options.operation,
            quiet=options.quiet,
            without_fsync=options.without_fsync,
            jobs=options.jobs,
        )
        print(json.dumps(asdict(report), indent=2))
        return 0 if report.recovered == report.points else 1
    started = time.monotonic()
    enumeration = Enumeration(options.folder, options.library, options.without_fsync)
    every = enumeration.points()
    operations = Counter(point.operation for point in every if point.fault == "kill")
    chosen = [p for p in every if options.fault in (None, p.fault) and options.operation in (None, p.operation)]
    if options.sample is not None and options.sample < len(chosen):
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    sampled = len(chosen) < len(every)
    job, jobs = map(int, options.part.split("/"))
    chosen = chosen[job::jobs]
    steps, failures = Counter[int](), []
    for number, point in enumerate(chosen, start=1):
        try:
            steps[enumeration.trial(point)] += 1
        except Exception as error:
            failures.append(f"{point}: {type(error).__name__}: {error}")
        if not options.quiet and number % 20 == 0:
            print(f"{number}/{len(chosen)} points, {len(failures)} not recovered", file=sys.stderr, flush=True)
    report = Report(
        points=len(chosen),
        recovered=len(chosen) - len(failures),
        operations=dict(sorted(operations.items())),
        faults=dict(sorted(Counter(point.fault for point in chosen).items())),
        found_old=steps[1],
        found_new=steps[2],
        failures=failures,
        seconds=round(time.monotonic() - started, 1),
        sampled=sampled,
    )
    print(json.dumps(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
