"""Does a run on the GPU do what the same run on the CPU does, and does it survive being killed? Through the command line."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError

HELP = "train the tiny model on the GPU, kill it, take it up again: losses beside the CPU's, memory and speed beside the plan"

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Nats: mean difference of a step's loss from the CPU's in fp32. Seen on one CPU over 60 steps of 8 sequences: fp32 by
other kernels, whose sums have another order, 1e-7 (5e-7 at most); bf16 against fp32 8e-3 (8e-2 at most)."""
VOCABULARY = 256
DOCUMENTS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is held against the CPU")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default 60)")
    parser.add_argument("--batch", type=int, default=32, help="sequences of 256 tokens in a step (default 32)")
    parser.add_argument("--seconds", type=float, default=300, help="stop what still runs after so many (default 300)")
    parser.add_argument("--override", action="append", default=[], help="further key=value for every run; repeatable")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("torch sees no GPU here: give --device cpu to try the command itself.")
    if args.steps < 6:
        raise ConfigError(f"--steps {args.steps}: at least 6, to be killed and taken up again in between.")
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as folder:
        result = _Comparison(args, Path(folder)).run()
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0 if result["passed"] else 1


class _Comparison:
    """The runs, each in a folder of its own."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.end = time.monotonic() + args.seconds
        self.every = max(2, args.steps // 6)
        self.corpus = _write_corpus(folder)
        self.started: list[subprocess.Popen] = []

    def run(self) -> dict[str, Any]:
        device = self.args.device
        failed: dict[str, str] = {}
        cpu = self._start("cpu", "cpu", "fp32")
        try:
            for name, dtype in (("fp32", "fp32"), ("bf16", "bf16")):
                self._finish(name, self._start(name, device, dtype), failed)
            killed = self._kill(self._start("killed", device, "fp32"), failed)
            if killed is not None:
                self._finish("killed", self._start("killed", device, "fp32"), failed)
            self._finish("cpu", cpu, failed)
        finally:
            for process in self.started:
                _end(process)
        return self._compare(killed, failed)

    def _start(self, name: str, device: str, dtype: str) -> subprocess.Popen:
        command = [
            *(sys.executable, "-m", "megalm.launch", "+model=tiny", f"model.vocab_size={VOCABULARY}"),
            *(f"data.train=[{self.corpus}]", "data.tokenizer=null", f"device={device}", f"precision={dtype}"),
            *("world_size=1", f"train.steps={self.args.steps}", f"train.global_batch_size={self.args.batch}"),
            *("train.eval_every=0", "train.eval_sequences=8", "train.sample=false", f"checkpoint.every={self.every}"),
            *("tracking.tensorboard=false", "tracking.report=false", f"run.dir={self.folder}", f"run.name={name}"),
            *self.args.override,
        ]
        with open(self.folder / f"{name}.log", "a", encoding="utf-8") as log:
            self.started.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True))
        return self.started[-1]

    def _finish(self, name: str, process: subprocess.Popen, failed: dict[str, str]) -> None:
        try:
            status = process.wait(max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process)
            failed[name] = "out of time"
            return
        if status:
            failed[name] = f"exit status {status}: {self._last_words(name)}"

    def _kill(self, process: subprocess.Popen, failed: dict[str, str]) -> int | None:
        """Kill the run once it has a checkpoint and has gone on from there; the last step that it had written down."""
        from megalm.checkpoint.commit import list_committed

        while process.poll() is None and time.monotonic() < self.end:
            done = max(self._losses("killed"), default=0)
            if list_committed(self.folder / "killed" / "checkpoints") and done % self.every:
                _end(process)
                return done
            time.sleep(0.002)
        _end(process)
        failed["killed"] = f"it could not be killed between two checkpoints: {self._last_words('killed')}"
        return None

    def _losses(self, name: str) -> dict[int, float]:
        """Loss of each step; of one that was made twice, the later."""
        from megalm.journal import read_course

        steps = read_course(self.folder / name / "metrics.jsonl").steps
        return {step["step"]: step["loss"] for step in steps if "loss" in step}

    def _last_words(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text(encoding="utf-8").strip().splitlines()
        return " | ".join(lines[-3:])[-600:]

    def _compare(self, killed: int | None, failed: dict[str, str]) -> dict[str, Any]:
        losses = {name: self._losses(name) for name in ("cpu", "fp32", "bf16", "killed")}
        result: dict[str, Any] = {
            "device": self.args.device,
            "steps": self.args.steps,
            "sequences_in_a_step": self.args.batch,
            "failed": failed,
            "losses": {name: list(values.values()) for name, values in losses.items()},
            "differences": {},
        }
        for dtype, tolerance in TOLERANCE.items():
            found = _difference(losses["cpu"], losses[dtype])
            result["differences"][dtype] = {
                **found,
                "tolerance": tolerance,
                "passed": len(losses[dtype]) == self.args.steps and bool(found) and found["mean"] <= tolerance,
            }
        result["killed_after_step"] = killed
        result["resumed_from_step"] = self._resumed()
        result["resumed_is_bitwise"] = bool(losses["fp32"]) and losses["killed"] == losses["fp32"]
        result["learned"] = _fell(losses["fp32"])
        result["plans"] = {name: self._plan(name) for name in ("fp32", "bf16")}
        checks = [result["resumed_is_bitwise"], bool(result["resumed_from_step"]), result["learned"], not failed]
        result["passed"] = all(checks) and all(found["passed"] for found in result["differences"].values())
        return result

    def _resumed(self) -> int | None:
        from megalm.journal import read_events

        found = [event for event in read_events(self.folder / "killed" / "events.jsonl") if event["kind"] == "resume"]
        return int(found[-1]["step"]) if found else None

    def _plan(self, name: str) -> dict[str, Any]:
        """What was planned beside what was measured."""
        with contextlib.suppress(OSError, ValueError):
            plan = json.loads((self.folder / name / "plan.json").read_text(encoding="utf-8"))
            measured = plan.get("measured", {})
            return {key: {"planned": plan.get(key), "measured": value} for key, value in measured.items()}
        return {}


def _difference(one: dict[int, float], other: dict[int, float]) -> dict[str, float]:
    """Mean and largest over the steps that both made; nothing without any."""
    apart = [abs(one[step] - other[step]) for step in one.keys() & other.keys()]
    return {"mean": sum(apart) / len(apart), "largest": max(apart)} if apart else {}


def _fell(losses: dict[int, float]) -> bool:
    return bool(losses) and losses[max(losses)] < losses[min(losses)] - 0.1


def _end(process: subprocess.Popen) -> None:
    """As a machine's failure ends it, with whatever it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write_corpus(folder: Path) -> str:
    """Python's own library, a token for each byte; returns the prefix for `data.train`."""
    import numpy as np

    from megalm.data.tokens import TokenWriter

    prefix = folder / "library_text_document"
    sources = sorted(Path(contextlib.__file__).parent.glob("*.py"))[:DOCUMENTS]
    with TokenWriter(prefix, np.uint16) as writer:
        for source in sources:
            writer.add_document(np.frombuffer(source.read_bytes(), np.uint8).astype(np.uint16))
    return str(prefix)


def _print(result: dict[str, Any]) -> None:
    print(f"tiny, {result['steps']} steps of {result['sequences_in_a_step']} sequences on {result['device']}")
    for dtype, found in result["differences"].items():
        verdict = "passed" if found["passed"] else "FAILED"
        if "mean" not in found:
            print(f"  {dtype}: no losses: {verdict}")
            continue
        print(
            f"  {dtype}: loss {found['mean']:.2e} nats from the CPU's in fp32 (mean; allowed {found['tolerance']:.0e}; largest "
            f"{found['largest']:.2e}): {verdict}"
        )
    print(
        f"  killed after step {result['killed_after_step']}, taken up again from step {result['resumed_from_step']}: "
        f"{'bitwise' if result['resumed_is_bitwise'] else 'NOT'} the undisturbed run"
    )
    for name, plan in result["plans"].items():
        for key, pair in plan.items():
            if pair["planned"] is None:
                continue
            print(f"  {name} {key}: planned {pair['planned']:.4g}, measured {pair['measured']:.4g}")
    for name, why in result["failed"].items():
        print(f"  {name} failed: {why}")
    print("passed" if result["passed"] else "FAILED")
