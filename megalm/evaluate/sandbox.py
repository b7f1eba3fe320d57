"""Programs that a model wrote, run by their tests where they can harm nothing: `confined` is the process that is shut in.

A program that hangs, forks, fills memory or disk, writes files or opens sockets ends as a failed one, with the reason said.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.evaluate import confined

SECONDS = 5
"""Of one program, and of its processor time: HumanEval's tests need well under one."""
MEGABYTES = 1024
"""Address space; an interpreter with its libraries takes about 50."""
SAID = 1 << 16
"""Bytes that are read of what it says."""


@dataclass(frozen=True)
class Ran:
    """How a program ended."""

    passed: bool
    note: str = ""
    """Why it did not pass."""


def run_program(program: str, *, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Ran:
    """Run a Python program to its end, with the standard library alone; it passes where nothing was raised.

    Errors: ConfigError where this machine cannot shut a program in (no seccomp)
    """
    if confined.find_machine() is None:
        raise ConfigError(
            "code that a model writes is run only where Linux's seccomp shuts it in, on x86_64 or aarch64; evaluate this there"
        )
    wait = 2 * seconds + 2  # of a machine that is busy, too: what computes ends by its processor time
    token = secrets.token_hex(16)
    asked = json.dumps({"program": program, "token": token, "seconds": seconds, "megabytes": megabytes}).encode()
    with tempfile.TemporaryDirectory(prefix="megalm-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(confined.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            said = _exchange(process, asked, wait)
        finally:
            _kill(process)
    if said is None:
        return Ran(False, f"it did not end within {wait} s")
    if len(said) > SAID:
        return Ran(False, "it said more than it was asked")
    return _read(said, token, process.returncode, seconds)


def _exchange(process: subprocess.Popen[bytes], asked: bytes, wait: float) -> bytes | None:
    """Hand over what is asked and take what is said, up to a little more than SAID bytes; None where it did not end in time."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(asked)
    end, said = time.monotonic() + wait, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(said) <= SAID:
            if not selector.select(max(0.0, end - time.monotonic())):
                return None
            part = os.read(process.stdout.fileno(), SAID)
            if not part:
                break
            said += part
    if len(said) > SAID:
        return said
    try:  # it has closed what it says: it ends, or must be ended
        process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    return said


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it, and all of its session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _read(said: bytes, token: str, status: int, seconds: int) -> Ran:
    for line in said.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if not isinstance(told, dict):
            continue
        if told.get("token") == token:
            return Ran(True)
        if told.get("broken") and told.get("by") == token:
            raise ConfigError(
                f"this machine cannot shut a program in ({told['broken']}): code that a model writes is not run here"
            )
        if "note" in told:
            return Ran(False, str(told["note"]))
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return Ran(False, f"it used more than {seconds} s of processor time")
    if status < 0:
        return Ran(False, f"it was ended by {signal.Signals(-status).name}")
    return Ran(False, "it ended itself before its tests did")
