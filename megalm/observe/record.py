"""What a run was set to and planned as, written when it trains."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.config.attempts import CONFIG, has_attempts, keep_attempt
from megalm.config.saved import write_config_yaml
from megalm.config.writing import explain_failed_writes, write_whole
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class RecordHook(Hook):
    """Writes config.yaml, configs/ (each attempt's settings with its first step) and plan.json."""

    def __init__(self, folder: Path, plan: dict[str, Any] | None) -> None:
        self.folder, self.plan = folder, plan
        self._first_step = 0

    def on_train_start(self, trainer: "Trainer") -> None:
        if trainer.step and not has_attempts(self.folder) and (before := self._before(trainer)):
            keep_attempt(self.folder, before, 1)
        self._keep(trainer, trainer.step + 1)
        file = self.folder / "plan.json"
        if self.plan is not None and self._planned(file) != json.loads(json.dumps(self.plan)):
            with explain_failed_writes(self.folder):
                write_whole(file, json.dumps(self.plan, indent=2) + "\n")

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if record["step"] < self._first_step:  # the run went back behind the step that it was started at
            self._keep(trainer, record["step"])

    def _keep(self, trainer: "Trainer", step: int) -> None:
        keep_attempt(self.folder, write_config_yaml(trainer.config), step)
        self._first_step = step

    def _before(self, trainer: "Trainer") -> str | None:
        """Find the settings that made the steps so far, for a run that an earlier version began."""
        if trainer.origin is not None and trainer.origin.settings is not None:
            return write_config_yaml(trainer.origin.settings)
        file = self.folder / CONFIG
        return file.read_text(encoding="utf-8", errors="surrogateescape") if file.exists() else None

    def _planned(self, file: Path) -> dict[str, Any] | None:
        """Read the plan that plan.json holds, without what was measured beside it; None where it holds none."""
        if not file.exists():
            return None
        try:
            plan = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return None  # torn by a crash
        plan.pop("measured", None)
        return plan
