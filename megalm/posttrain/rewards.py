"""What a completion is worth: verifiers, and functions of the user's in a process of their own."""

from __future__ import annotations

import json
import math
import re
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megalm.config.errors import ConfigError
from megalm.config.rollout import RolloutConfig
from megalm.evaluate.answers import is_same_number

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_START_S = 120.0
"""To start Python and import what the user's file imports."""


class RewardFailed(Exception):
    """A reward function gave no number; the message says what it did."""


class Reward(Protocol):
    """Judges one completion at a time."""

    name: str

    def judge(self, prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        """Errors: RewardFailed"""
        ...

    def close(self) -> None:
        """End what runs beside."""
        ...


class Verifier:
    """One of the built-in rewards: 1.0 where the completion is the record's `answer`, else 0.0."""

    def __init__(self, name: str) -> None:
        self.name = name

    def judge(self, prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        answer = record.get("answer")
        if not isinstance(answer, str | int | float):
            raise RewardFailed(f"the reward {self.name} compares with the record's field `answer`, which is {answer!r}")
        if self.name == "exact":
            return float(" ".join(completion.split()) == " ".join(str(answer).split()))
        if self.name == "math":
            return float(is_same_number(completion, str(answer)))
        return float(_last_number(completion) == _last_number(str(answer)) is not None)

    def close(self) -> None:
        """Nothing runs."""


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


class UserReward:
    """FUNCTION of FILE.py, in a process that is ended where it takes too long."""

    def __init__(self, spelled: str, timeout_s: float) -> None:
        """Errors: ConfigError for a file or function that is not there"""
        path, _, self.function = spelled.rpartition(":")
        self.path, self.timeout_s = Path(path), timeout_s
        self.name = self.function
        if not self.path.is_file():
            raise ConfigError(f"rollout.rewards: {spelled}: there is no file {path}.")
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        try:
            self._start()
        except RewardFailed as error:
            raise ConfigError(f"rollout.rewards: {spelled}: {error}.") from None

    def judge(self, prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            asked = {"prompt": prompt, "completion": completion, "record": record}
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self.close()
            raise RewardFailed(f"{self.name}'s process has ended") from None
        answer = self._read(self.timeout_s)
        if "error" in answer:
            raise RewardFailed(f"{self.name} raised {answer['error']}")
        return float(answer["value"])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process, self._rest = None, b""

    def _start(self) -> None:
        worker = Path(__file__).parent / "reward_worker.py"
        command = [sys.executable, str(worker), str(self.path), self.function]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        answer = self._read(_START_S)
        if "error" in answer:
            self.close()
            raise RewardFailed(answer["error"])

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout
        while b"\n" not in self._rest:
            if not select.select([pipe], [], [], timeout_s)[0]:
                self.close()
                raise RewardFailed(f"{self.name} took longer than rollout.reward_timeout_s={timeout_s:g} s")
            more = pipe.read1(1 << 16)  # type: ignore[attr-defined]
            if not more:
                self.close()
                raise RewardFailed(f"{self.name}'s process has ended")
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Judgement:
    """What the rewards say of one completion."""

    values: tuple[float, ...]
    """Of each reward; 0 where it failed."""
    failure: str | None = None
    """What one of them did in place of giving a number."""


class Rewards:
    """All rewards of a run, by their names, and their weighted sum."""

    def __init__(self, config: RolloutConfig) -> None:
        """Errors: ConfigError for a file or function that is not there"""
        self.retries = config.reward_retries
        self.each: list[Reward] = [
            UserReward(name, config.reward_timeout_s) if ".py:" in name else Verifier(name) for name in config.rewards
        ]
        self.weights = config.reward_weights or [1.0] * len(self.each)
        self.names = [reward.name for reward in self.each]
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ConfigError(f"rollout.rewards: two are called {twice[0]}: give one of the functions another name.")

    def judge(self, prompt: str, completion: str, record: Mapping[str, Any]) -> Judgement:
        """Ask each reward, again where it failed."""
        values, failure = [], None
        for reward in self.each:
            value = 0.0
            for attempt in range(1 + self.retries):
                try:
                    value = reward.judge(prompt, completion, record)
                    if math.isfinite(value):
                        break
                    raise RewardFailed(f"{reward.name} gave {value}")
                except RewardFailed as error:
                    value = 0.0
                    if attempt == self.retries:
                        failure = failure or str(error)
            values.append(value)
        return Judgement(tuple(values), failure)

    def total(self, values: Sequence[float]) -> float:
        """The weighted sum."""
        return math.fsum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def close(self) -> None:
        """End the functions' processes."""
        for reward in self.each:
            reward.close()
