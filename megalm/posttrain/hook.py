"""Shows what a run writes: samples of its rollouts to be read, and what the guard finds wrong with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.config import Config
from megalm.config.rollout import BUILT_IN
from megalm.guard.rollout import Finding, RolloutWatch
from megalm.posttrain.rollout import RolloutSource
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

log = logging.getLogger(__name__)
SHOWN = 8
"""Groups that are written beside a finding."""


class RolloutHook(Hook):
    """Keeps samples in the run's folder `samples`, and answers findings as guard.rollout.answers says. On every rank."""

    name = "rollout"

    def __init__(self, config: Config, folder: Path, source: RolloutSource) -> None:
        self.settings, self.guard, self.source = config.rollout, config.guard, source
        self.folder = folder / "samples"
        self.watch = RolloutWatch(config.guard.rollout, [name for name in config.rollout.rewards if name in BUILT_IN])
        self.factor = 1.0

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Look at each rollout once, in its first step; one that the guard has taken back is not looked at."""
        if trainer.step != record["step"] or "rollout/length" not in record:
            return
        if trainer.is_writer and self.settings.samples:
            self._write("rollouts.jsonl", record["step"], self.source.samples(self.settings.samples), append=True)
        if not self.guard.enabled:
            return
        for finding in self.watch.see(record):
            self._answer(trainer, record["step"], finding)

    def _answer(self, trainer: Trainer, step: int, finding: Finding) -> None:
        answer = self.guard.rollout.answers.get(finding.cause, "event") if self.guard.act else "event"
        file = f"{finding.cause}-step-{step}.jsonl"
        if trainer.is_writer:
            self._write(file, step, self.source.samples(SHOWN), append=False)
        where = f"samples/{file}"
        trainer.events.write("rollout", step=step, cause=finding.cause, value=finding.value, answer=answer, samples=where,
                             text=f"{finding.text}; samples: {where}")  # fmt: skip
        if answer == "lower_rate":
            self.factor *= self.guard.rollout.lower_rate
            trainer.control.set_rate_factor(self.name, self.factor)
        elif answer == "pause":
            reason = (
                f"paused at step {step}: {finding.text}. Read {self.folder / file}; the same command goes on from here"
            )
            trainer.control.finish(130, reason)
        elif answer == "stop":
            trainer.control.finish(3, f"stopped at step {step}: {finding.text}. Samples: {self.folder / file}")

    def _write(self, name: str, step: int, groups: list[dict[str, Any]], *, append: bool) -> None:
        """A line for each group; what cannot be written ends no run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / name, "a" if append else "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **group}, ensure_ascii=False) + "\n" for group in groups)
        except OSError as error:
            log.warning("samples/%s cannot be written: %s", name, error)

    def state_dict(self) -> dict[str, Any]:
        return {"watch": self.watch.state_dict(), "factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state.get("watch", {}))
        self.factor = state.get("factor", 1.0)
