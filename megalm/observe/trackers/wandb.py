"""A run in Weights & Biases: on its server where there is a key, else in files that `wandb sync` sends later."""

from __future__ import annotations

import contextlib
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.config import Config, ConfigError
from megalm.observe.trackers.identity import recall_run, remember_run
from megalm.observe.trackers.lineage import describe_settings
from megalm.observe.trackers.tracker import Tracker

if TYPE_CHECKING:
    from wandb import Run

HOST = "api.wandb.ai"


class WeightsAndBiases(Tracker):
    """Steps stand on an axis of their own, for W&B's counts only forwards; steps that come again stand beside the first.

    What W&B would collect by itself (command line, environment, console, code) is turned off: it may hold secrets.
    """

    def __init__(self, folder: Path, project: str) -> None:
        try:
            import wandb  # noqa: F401
        except ModuleNotFoundError:
            raise ConfigError("tracking.trackers=[wandb] needs wandb: pip install megalm[wandb].") from None
        self.folder, self.project = folder, project

    def start(self, config: Config, step: int) -> None:
        import wandb

        run_id = recall_run(self.folder, "wandb") or uuid.uuid4().hex[:12]
        place = self.folder / "tracking"
        place.mkdir(exist_ok=True)
        self.run: Run = wandb.init(
            id=run_id,
            name=self.folder.name,
            project=os.environ.get("WANDB_PROJECT", self.project),
            dir=str(place),
            resume="allow",
            mode=None if os.environ.get("WANDB_MODE") or has_key() else "offline",
            config=describe_settings(config),
            allow_val_change=True,
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, save_code=False, x_disable_meta=True
            ),
        )
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        address = self.run.url or f"offline: wandb sync {Path(self.run.dir).parent}"
        remember_run(self.folder, "wandb", run_id, address)

    def describe(self, facts: Mapping[str, str]) -> None:
        self.run.config.update({"lineage": dict(facts)}, allow_val_change=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        self.run.summary[f"{name}/last"] = text

    def finish(self, status: int, files: Sequence[Path]) -> None:
        import wandb

        if files:
            artifact = wandb.Artifact(f"{self.run.id}-report", type="report")
            for file in files:
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=status)


def has_key() -> bool:
    """Whether W&B would find a key without asking: in the environment, or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        host = os.environ.get("WANDB_BASE_URL", f"https://{HOST}").partition("://")[2].partition("/")[0]
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
