"""Watches what a policy writes and how it is rewarded: the ways in which reinforcement goes wrong without a loss that says so.

Pure: a step's record in, findings out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from megalm.config.guard_rollout import RolloutGuardConfig

DEVIATIONS = 3.0
"""Standard errors that the means of two windows must be apart."""
SUMS = ("reward/mean", "reward/std", "reward/failed")
"""Numbers about all rewards together."""
RISE, FALL = 0.05, 0.02
"""And this much in absolute terms, so that a reward of hardly any spread is not taken for one that moves."""

FLAT = (
    "in {value:.0%} of the groups all completions have the same reward ({reward:.3g} in the mean): nothing is learned from "
    "them. Where it is low the prompts are too hard, or the reward never fires: begin with easier ones, or fine-tune more; "
    "where it is high they are solved"
)
CUT = (
    "{value:.0%} of the completions are cut at rollout.max_tokens: an answer that comes later is never rewarded. Set it "
    "higher, or fine-tune until texts end by themselves"
)
ENTROPY_LOW = (
    "the entropy has fallen from {start:.3g} to {value:.3g} nats a token: nothing new is tried any more. A lower optim.lr, a "
    "wider objective.policy.clip_high, or a divergence to the reference hold it"
)
ENTROPY_HIGH = (
    "the entropy has grown from {start:.3g} to {value:.3g} nats a token: the policy falls apart. Lower optim.lr, or set "
    "objective.policy.kl"
)
LENGTH = "completions have {value:.1f} tokens in the mean, and had {start:.1f}: does a reward pay for length?"
REPEATED = "{value:.0%} of the n-grams stood in their completion before: it says the same again and again"
KL = "the policy is {value:.3g} nats a token from the weights that it began with. Raise objective.policy.kl, or lower optim.lr"
MISMATCH = "trainer and sampler, with the same weights, are {value:.2g} nats a token apart: what is trained is not what was drawn"


@dataclass(frozen=True)
class Finding:
    """Something about rollouts that has held for too long."""

    cause: str
    value: float
    text: str


class RolloutWatch:
    """Judges the rollouts of a run, one record after the other; its state goes into the checkpoint.

    verifiers: names of the rewards that tell right from wrong.
    """

    def __init__(self, config: RolloutGuardConfig, verifiers: Collection[str] = ()) -> None:
        self.config, self.verifiers = config, set(verifiers)
        self.streaks: dict[str, int] = {}
        self.told: set[str] = set()
        self.first: dict[str, list[float]] = {}
        """Of each number the values of the first rollouts."""
        self.recent: dict[str, list[float]] = {}

    def see(self, record: Mapping[str, Any]) -> list[Finding]:
        """Take the record of a step that began with a rollout; gives what is told now."""
        if "rollout/length" not in record:
            return []
        for key, value in record.items():
            if key.startswith(("reward/", "rollout/")):
                window = self.recent.setdefault(key, [])
                window.append(float(value))
                del window[: -self.config.patience]
                first = self.first.setdefault(key, [])
                if len(first) < self.config.patience:
                    first.append(float(value))
        found = {finding.cause: finding for finding in [*self._judge(record), *self._compare_rewards()]}
        for cause in [*self.streaks]:
            if cause not in found:
                self.streaks.pop(cause)
                self.told.discard(cause)
        told = []
        for cause, finding in found.items():
            self.streaks[cause] = self.streaks.get(cause, 0) + 1
            enough = self.streaks[cause] >= self.config.patience or cause in ("reward", "accuracy")
            if enough and cause not in self.told:
                self.told.add(cause)
                told.append(finding)
        return told

    def _judge(self, record: Mapping[str, Any]) -> list[Finding]:
        """Judge what one rollout is out of line with."""
        config, found = self.config, []

        def tell(cause: str, key: str, text: str, start: float = 0.0) -> None:
            value = float(record[key])
            found.append(Finding(cause, value, text.format(value=value, start=start, reward=record["reward/mean"])))

        if record["rollout/flat"] >= config.flat:
            tell("flat", "rollout/flat", FLAT)
        if record["rollout/cut"] >= config.cut:
            tell("cut", "rollout/cut", CUT)
        entropy, start = record["rollout/entropy"], self._start("rollout/entropy")
        if start is not None and entropy < config.entropy_low * start:
            tell("entropy", "rollout/entropy", ENTROPY_LOW, start)
        if start is not None and entropy > config.entropy_high * start:
            tell("entropy", "rollout/entropy", ENTROPY_HIGH, start)
        length, start = record["rollout/length"], self._start("rollout/length")
        if start is not None and not start / config.length_factor <= length <= start * config.length_factor:
            tell("length", "rollout/length", LENGTH, start)
        repeated, start = record["rollout/repeated"], self._start("rollout/repeated")
        if repeated >= config.repeated and (start is None or repeated > 2 * start):
            tell("repeated", "rollout/repeated", REPEATED)
        if record.get("policy/kl", 0.0) > config.kl:
            tell("kl", "policy/kl", KL)
        if record.get("policy/mismatch", 0.0) > config.mismatch:
            tell("mismatch", "policy/mismatch", MISMATCH)
        return found

    def _start(self, key: str) -> float | None:
        """Mean of the first rollouts, once there are enough of them."""
        first = self.first.get(key, [])
        return fmean(first) if len(first) >= self.config.patience else None

    def _compare_rewards(self) -> list[Finding]:
        """Whether the sum has risen since the beginning, and what has not risen with it."""
        if not self._moved("reward/mean", up=True):
            return []
        found = []
        before, now = self._start("reward/mean") or 0.0, fmean(self.recent["reward/mean"])
        rise = f"the reward has risen from {before:.3g} to {now:.3g}"
        parts = [
            key
            for key in self.first
            if key.startswith("reward/") and key not in ("reward/mean", "reward/std", "reward/failed")
        ]
        falling = [key for key in parts if self._moved(key, up=False)]
        for key in falling[:1]:
            text = f"{rise}, and {key} has fallen from {self._start(key):.3g} to {fmean(self.recent[key]):.3g}: the others are "
            found.append(
                Finding("reward", fmean(self.recent[key]), text + "bought with it. Read the samples, and weigh it more")
            )
        truths = [key for key in parts if key.removeprefix("reward/") in self.verifiers]
        if truths and len(parts) > len(truths) and not any(self._moved(key, up=True) for key in truths):
            value = fmean(self.recent[truths[0]])
            text = f"{rise}, and {truths[0]} stays at {value:.3g}: what is learned is the rewards' form, and not what is right"
            found.append(Finding("accuracy", value, text))
        return found

    def _moved(self, key: str, *, up: bool) -> bool:
        """Whether the last rollouts' mean is above (below) the first ones' by more than chance."""
        first, last = self.first.get(key, []), self.recent.get(key, [])
        count = self.config.patience
        if count < 2 or len(first) < count or len(last) < count:
            return False
        error = math.sqrt((variance(first) + variance(last)) / count)
        moved = (fmean(last) - fmean(first)) * (1 if up else -1)
        return moved > max(DEVIATIONS * error, RISE if up else FALL)

    def state_dict(self) -> dict[str, Any]:
        return {"streaks": self.streaks, "told": sorted(self.told), "first": self.first, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.streaks, self.told = dict(state.get("streaks", {})), set(state.get("told", ()))
        self.first = {key: list(values) for key, values in state.get("first", {}).items()}
        self.recent = {key: list(values) for key, values in state.get("recent", {}).items()}
