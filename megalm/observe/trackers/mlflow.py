"""A run in MLflow: on a server of $MLFLOW_TRACKING_URI, or in a file beside the runs."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.config import Config, ConfigError
from megalm.observe.trackers.identity import recall_run, remember_run
from megalm.observe.trackers.lineage import describe_settings
from megalm.observe.trackers.tracker import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_log = logging.getLogger(__name__)

EVERY_S = 5.0
"""Seconds between two requests with all that came meanwhile; one for each step would be most of a server's work."""
MOST = 1000
"""Metrics in one request, MLflow's limit; and parameters in one request are 100."""
KEPT = 200_000
"""Metrics that wait while a server does not answer; older ones are let go of."""
LONGEST = 6000
"""Characters of a parameter's value."""
PATIENCE_S = 30.0
"""How long the run's end waits for what is still to be sent."""
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")


class MLflow(Tracker):
    """Sends numbers in the background: a server that is slow, or away, costs the steps nothing and loses nothing.

    MLflow cannot forget a step: where the run goes back, the steps that come again stand beside the first, which are older.
    """

    def __init__(self, folder: Path, project: str) -> None:
        try:
            import mlflow  # noqa: F401
        except ModuleNotFoundError:
            raise ConfigError("tracking.trackers=[mlflow] needs MLflow: pip install megalm[mlflow].") from None
        self.folder, self.project = folder, project
        self._waiting: list[Metric] = []
        self._lock, self._ends = threading.Lock(), threading.Event()
        self._sender: threading.Thread | None = None

    def start(self, config: Config, step: int) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")  # theirs are 120 s and 7 tries
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.folder.parent.resolve()}/mlflow.db"
        self.client: MlflowClient = MlflowClient(self.address)
        known = recall_run(self.folder, "mlflow")
        if known is not None:
            try:
                self.client.update_run(known, status="RUNNING")
            except MlflowException as error:
                _log.warning("MLflow does not know the run %s any more (%s): a new one is begun", known, error)
                known = None
        self.run_id = known or self._create_run()
        remember_run(self.folder, "mlflow", self.run_id, self.address)
        self._send_settings(config, MlflowException)
        self._sender = threading.Thread(target=self._send_on, name="mlflow", daemon=True)
        self._sender.start()

    def _create_run(self) -> str:
        experiment = self.client.get_experiment_by_name(self.project)
        if experiment is None:
            place = None if "://" in self.address and not self.address.startswith("sqlite") else self._artifacts()
            number = self.client.create_experiment(self.project, artifact_location=place)
        else:
            number = experiment.experiment_id
        return str(self.client.create_run(number, run_name=self.folder.name).info.run_id)

    def _artifacts(self) -> str:
        return (self.folder.parent.resolve() / "mlflow-artifacts").as_uri()

    def _send_settings(self, config: Config, refused: type[Exception]) -> None:
        """Parameters of the first start stay; what a later one set otherwise is a tag, for MLflow changes no parameter."""
        from mlflow.entities import Param, RunTag

        held = self.client.get_run(self.run_id).data.params
        settings = {key: str(value)[:LONGEST] for key, value in describe_settings(config).items()}
        new = [Param(key, value) for key, value in settings.items() if key not in held]
        for begin in range(0, len(new), 100):
            self.client.log_batch(self.run_id, params=new[begin : begin + 100])
        changed = [RunTag(f"changed.{key}", value) for key, value in settings.items() if held.get(key, value) != value]
        for begin in range(0, len(changed), 100):
            self.client.log_batch(self.run_id, tags=changed[begin : begin + 100])

    def describe(self, facts: Mapping[str, str]) -> None:
        for name, fact in facts.items():
            self.client.set_tag(self.run_id, _NOT_IN_A_NAME.sub("_", name), fact)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [Metric(_NOT_IN_A_NAME.sub("_", name), float(value), now, step) for name, value in values.items()
               if math.isfinite(value)]  # fmt: skip
        with self._lock:
            self._waiting += new
            if len(self._waiting) > KEPT:
                _log.warning("MLflow does not answer: %d numbers are let go of", len(self._waiting) - KEPT)
                del self._waiting[:-KEPT]

    def text(self, step: int, name: str, text: str) -> None:
        self._later(lambda: self.client.set_tag(self.run_id, _NOT_IN_A_NAME.sub("_", name), text))

    def _later(self, call: Callable[[], Any]) -> None:
        threading.Thread(target=self._try, args=(call,), daemon=True).start()

    def _try(self, call: Callable[[], Any]) -> bool:
        try:
            call()
        except Exception as error:  # a network's: whatever it is, the run goes on
            _log.warning("MLflow at %s: %s", self.address, error)
            return False
        return True

    def _send_on(self) -> None:
        while not self._ends.wait(EVERY_S):
            self._send()

    def _send(self) -> bool:
        """Send what waits, oldest first; what could not be sent waits on."""
        while True:
            with self._lock:
                batch = self._waiting[:MOST]
            if not batch:
                return True
            if not self._try(partial(self.client.log_batch, self.run_id, metrics=batch)):
                return False
            with self._lock:
                del self._waiting[: len(batch)]

    def finish(self, status: int, files: Sequence[Path]) -> None:
        self._ends.set()
        if self._sender is None:
            return
        self._sender.join(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while not self._send() and time.monotonic() < deadline:
            time.sleep(1.0)
        for file in files:
            self._try(partial(self.client.log_artifact, self.run_id, str(file)))
        ended = "FINISHED" if status == 0 else "KILLED" if status == 130 else "FAILED"
        self._try(lambda: self.client.set_terminated(self.run_id, ended))
