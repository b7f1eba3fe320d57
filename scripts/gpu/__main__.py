"""Runs the stages of a call one after the other, each within its time, and keeps what they write in three files.

    DEVICE-DATE-COMMIT-CALL.json           what each stage came to, and the results that its commands wrote
    DEVICE-DATE-COMMIT-CALL-logs.tar.gz    the stages' whole output
    DEVICE-DATE-COMMIT-CALL-trace.json.gz  a profiled step, where there is one

They are written again every few seconds: whatever ends the call, what was known then stays. Exit status: 0; 1 where a stage
failed; 2 where the call cannot begin.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.gpu.stages import BUILD, CALLS, LIMIT, Stage

ROOT = Path(__file__).resolve().parents[2]
_WRITE_EVERY = 5.0
_GRACE = 10.0
"""Seconds that an interrupted command has to write what it knows."""
_LAST_LINES = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Run a call; returns the exit status."""
    args = _parse(argv)
    device = args.pretend or "cuda"
    with tempfile.TemporaryDirectory(prefix="megalm-gpu-") as scratch:
        call = Call(args.call, device, Path(scratch), args.results, args.seconds)
        stages = [stage for stage in CALLS[args.call] if not args.stage or stage.name in args.stage]
        return call.run(stages)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("call", choices=CALLS, help="A: right, and where the time goes; B: beside others")
    parser.add_argument("stage", nargs="*", help="only these stages of the call")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder (benchmarks/results)"
    )
    parser.add_argument("--seconds", type=float, default=LIMIT, help=f"of the whole call (default {LIMIT})")
    parser.add_argument("--pretend", choices=("cpu",), help="every stage at tiny sizes, without a GPU")
    args = parser.parse_intermixed_args(argv)  # stages may stand behind options
    names = [stage.name for stage in CALLS[args.call]]
    if unknown := [name for name in args.stage if name not in names]:
        parser.error(f"{', '.join(unknown)}: call {args.call} has the stages {', '.join(names)}")
    return args


class Call:
    """The stages of one call, and what they came to."""

    def __init__(self, name: str, device: str, scratch: Path, results: Path, seconds: float) -> None:
        self.name, self.device, self.scratch, self.results = name, device, scratch, results
        self.end = time.monotonic() + seconds
        self.begun = time.monotonic()
        self.stages: dict[str, dict[str, Any]] = {}
        self.machine = _describe_machine(device)
        self.written = 0.0
        results.mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[Stage]) -> int:
        """Run them in order, the build beside those that need no extension; returns the exit status."""
        print(f"{self.name}: {self.machine['device']}, torch {self.machine['torch']}, {sys.executable}", flush=True)
        build = _Running(BUILD, self) if any(stage.needs_build for stage in stages) else None
        built = True
        for stage in stages:
            if stage.needs_build and build is not None:
                built = build.finish()
                build = None
            if stage.needs_build and not built:
                self.note(stage, "not run: the build failed")
            elif why := _explain_lack(stage, self.device):
                self.note(stage, f"skipped: {why}")
            elif self.left() < 1:
                self.note(stage, "not run: out of time")
            else:
                _Running(stage, self).finish()
        if build is not None:
            build.finish()
        self.write(force=True)
        failed = False
        print("== summary")
        for name, found in self.stages.items():
            failed = failed or found["outcome"].startswith(("FAILED", "not run"))
            taken = f", {found['seconds']:.0f} s" if "seconds" in found else ""
            print(f"{name}: {found['outcome']}{taken}")
        print(f"results: {self.results / self._stem()}*, {time.monotonic() - self.begun:.0f} s in all")
        return 1 if failed else 0

    def left(self) -> float:
        """Seconds until the call must be over."""
        return self.end - time.monotonic()

    def note(self, stage: Stage, outcome: str, **more: Any) -> None:
        """Remember what a stage came to."""
        self.stages[stage.name] = {"says": stage.says, "outcome": outcome, **more}
        self.write(force=True)

    def write(self, force: bool = False) -> None:
        """Write the three files anew from what lies there now."""
        if not force and time.monotonic() - self.written < _WRITE_EVERY:
            return
        self.written = time.monotonic()
        summary = {**self.machine, "call": self.name, "seconds": round(time.monotonic() - self.begun, 1), "stages": {}}
        for name, found in self.stages.items():
            summary["stages"][name] = {**found, "results": self._read_results(name)}
        aside = self.scratch / "summary.json"
        aside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        self._place(aside, f"{self._stem()}.json")
        aside = self.scratch / "logs.tar.gz"
        with tarfile.open(aside, "w:gz") as archive:
            for log in sorted(self.scratch.glob("*/log.txt")):
                archive.add(log, f"{log.parent.name}.txt")
        self._place(aside, f"{self._stem()}-logs.tar.gz")
        for trace in self.scratch.glob("*/trace.json.gz"):
            self._place(trace, f"{self._stem()}-trace.json.gz")

    def _read_results(self, stage: str) -> dict[str, Any]:
        """What the stage's commands have written so far; a file that is being written is read the next time."""
        results = {}
        for path in sorted((self.scratch / stage).glob("*.json")):
            with contextlib.suppress(ValueError, OSError):
                results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        return results

    def _place(self, source: Path, name: str) -> None:
        aside = self.results / f".{name}"
        shutil.copyfile(source, aside)
        aside.replace(self.results / name)

    def _stem(self) -> str:
        machine = self.machine
        return (
            f"{machine['device'].lower().replace(' ', '-')}-{machine['date']}-{machine['commit']}-{self.name.lower()}"
        )


class _Running:
    """A stage whose commands run one after the other, within its time and the call's."""

    def __init__(self, stage: Stage, call: Call) -> None:
        self.stage, self.call = stage, call
        self.begun = time.monotonic()
        self.end = min(self.begun + stage.seconds, call.end)
        self.folder = call.scratch / stage.name
        self.folder.mkdir()
        self.log = open(self.folder / "log.txt", "ab")  # noqa: SIM115  closed in `finish`
        self.commands = list(stage.commands if call.device == "cuda" else stage.pretend)
        self.failed: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        call.note(stage, "running")
        self._start_next()

    def _start_next(self) -> None:
        words = shlex.split(self.commands.pop(0).format(device=self.call.device, out=self.folder))
        words = [sys.executable if word == "python" else word for word in words]
        print(f"== {self.stage.name}: {shlex.join(words)}", flush=True)
        self.log.write(f"$ {shlex.join(words)}\n".encode())
        self.log.flush()
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, start_new_session=True,
            env=_make_environment(self.call.device),
        )  # fmt: skip

    def finish(self) -> bool:
        """Wait until all commands are done or the time is up; returns whether all was well."""
        try:
            while self.process is not None:
                status = self._wait()
                if status is None:
                    _interrupt(self.process)
                    self.failed.append("out of time")
                    break
                if status:
                    self.failed.append(f"exit status {status}")
                self.process = None
                if self.commands:
                    self._start_next()
        finally:
            if self.process is not None:
                _interrupt(self.process)
            self.log.close()
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        outcome = f"FAILED ({', '.join(self.failed)})" if self.failed else "passed"
        # What memcheck found until its time was over stands: it did not come to an end, and nothing was wrong.
        if self.stage.seconds >= LIMIT and self.failed == ["out of time"]:
            outcome = "passed as far as it came"
        seconds = round(time.monotonic() - self.begun, 1)
        self.call.note(self.stage, outcome, seconds=seconds, limit=self.stage.seconds, last_lines=lines[-_LAST_LINES:])
        print("\n".join(f"   {line[:200]}" for line in lines[-_LAST_LINES:]), flush=True)
        return not self.failed

    def _wait(self) -> int | None:
        """The command's exit status; None when the stage's time is over."""
        assert self.process is not None
        while (left := self.end - time.monotonic()) > 0:
            try:
                return self.process.wait(min(left, 1.0))
            except subprocess.TimeoutExpired:
                self.call.write()
        return None


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does: pytest and the benchmarks then say how far they came; what is left after that is killed."""
    for kind, seconds in ((signal.SIGINT, _GRACE), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _make_environment(device: str) -> dict[str, str]:
    # Only pytest's own plug-ins and those that are named: others of this machine may not load here.
    more = {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if device == "cpu":
        more |= {"MEGALM_TEST_DEVICE": "cpu", "TORCHDYNAMO_DISABLE": "1"}  # compiling takes minutes on a processor
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"), **more}


def _explain_lack(stage: Stage, device: str) -> str | None:
    """Why a stage cannot be run here; None: it can."""
    if not stage.needs or shutil.which(stage.needs) or importlib.util.find_spec(stage.needs.replace("-", "_")):
        return None
    return f"{stage.needs} is not here" if device == "cuda" or stage.needs == "hydra" else None


def _describe_machine(device: str) -> dict[str, str]:
    import torch

    commit = os.environ.get("MEGALM_COMMIT", "")
    if not commit:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = found.stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else f"pretend-{device}"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
    }


if __name__ == "__main__":
    sys.exit(main())
