"""Runs in MLflow (a real server on loopback, and a file) and in W&B's offline files; each where its package is installed."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from megalm.config.compose import compose_config
from megalm.journal import read_course
from tests.small_run import small_run

ROOT = Path(__file__).resolve().parents[3]


def train(folder, *words, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "MLFLOW_"))}
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "megalm", "train", *small_run(folder, *words)],
        cwd=folder, env={**clean, **here}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode in (0, 130), done.stderr
    return done


def test_a_tracker_whose_package_is_missing_is_said_before_anything_is_trained(tmp_path):
    for name in ("wandb", "mlflow"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError")  # in front of an installed one
        done = subprocess.run(
            [sys.executable, "-m", "megalm", "train", *small_run(tmp_path, f"tracking={name}")],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert f"tracking.trackers=[{name}] needs" in done.stderr and f"pip install megalm[{name}]" in done.stderr
        assert not (tmp_path / "runs/small/metrics.jsonl").exists()


def test_the_choices_of_tracking_are_there():
    assert compose_config(["+model=tiny", "tracking=mlflow"]).tracking.trackers == ["mlflow"]
    assert compose_config(["+model=tiny", "tracking=wandb"]).tracking.trackers == ["wandb"]
    assert compose_config(["+model=tiny", "tracking=tensorboard"]).tracking.tensorboard


# ------------------------------------------------------------------------------------------------------------- MLflow
@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder / "kept")]
    with open(folder / "log", "w") as log:
        running = subprocess.Popen([sys.executable, "-m", "mlflow", *command], cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                assert running.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        running.terminate()
        running.wait(30)


def history(client, run_id, name):
    return [(each.step, each.value) for each in client.get_metric_history(run_id, name)]


def test_mlflow_holds_one_run_over_a_resume_with_its_settings_lineage_and_report(server, tmp_path):
    from mlflow import MlflowClient

    secret = "run.plugin_options={api_key: hunter2}"
    train(tmp_path, "tracking=mlflow", "train.steps=3", secret, MLFLOW_TRACKING_URI=server)
    train(tmp_path, "tracking=mlflow", "train.steps=6", secret, MLFLOW_TRACKING_URI=server)
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("megalm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "small" and run.info.status == "FINISHED"
    kept = json.loads((tmp_path / "runs/small/tracking/mlflow.json").read_text())
    assert kept == {"run_id": run.info.run_id, "address": server}
    steps = read_course(tmp_path / "runs/small/metrics.jsonl").steps
    assert history(client, run.info.run_id, "train/loss") == [
        (step["step"], pytest.approx(step["loss"])) for step in steps
    ]
    assert [step for step, _ in history(client, run.info.run_id, "eval/loss")] == [3, 6]
    assert run.data.params["optim.lr"] == "0.01" and run.data.params["train.steps"] == "3"
    assert run.data.tags["changed.train.steps"] == "6"
    assert run.data.params["run.plugin_options.api_key"] == "***" and "hunter2" not in str(run.data)
    assert len(run.data.tags["data/numbers"]) == 16 and run.data.tags["megalm"]
    names = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert names == {"report.html", "config.yaml", "plan.json", "events.jsonl"}


def test_mlflow_without_a_server_is_a_file_beside_the_runs(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    train(tmp_path, "tracking=mlflow", "train.steps=3", "tracking.project=mine")
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert len(history(client, run.info.run_id, "train/loss")) == 3
    assert (tmp_path / "runs/mlflow-artifacts" / run.info.run_id / "artifacts/report.html").is_file()


def test_a_server_that_is_away_costs_the_run_nothing_but_the_showing(tmp_path):
    pytest.importorskip("mlflow")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = train(tmp_path, "tracking=mlflow", MLFLOW_TRACKING_URI=nowhere, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert done.returncode == 0 and len(read_course(tmp_path / "runs/small/metrics.jsonl").steps) == 6
    events = (tmp_path / "runs/small/events.jsonl").read_text()
    assert "MLflow failed and shows nothing more" in events


# ---------------------------------------------------------------------------------------------------------------- W&B
def read_offline(file):
    """Every record of an offline file: LevelDB's log format behind seven bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    raw, place, records, parts = file.read_bytes(), 7, [], b""
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, place)
        parts += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_wandb_without_a_key_is_kept_offline_as_one_run(tmp_path):
    pytest.importorskip("wandb")
    secret = "run.plugin_options={api_key: hunter2}"
    train(tmp_path, "tracking=wandb", "train.steps=3", secret)
    train(tmp_path, "tracking=wandb", "train.steps=6", secret)
    files = sorted((tmp_path / "runs/small/tracking/wandb").glob("offline-run-*/*.wandb"))
    kept = json.loads((tmp_path / "runs/small/tracking/wandb.json").read_text())
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{kept['run_id']}"}
    assert kept["address"].startswith("offline: wandb sync ")
    losses = {}
    for file in files:
        raw = file.read_bytes()
        assert b"hunter2" not in raw
        for record in read_offline(file):
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if "train/loss" in items:
                    losses[int(items["step"])] = float(items["train/loss"])
            if record.WhichOneof("record_type") == "run":
                assert record.run.project == "megalm" and record.run.display_name == "small"
                configured = {
                    item.key or "/".join(item.nested_key): item.value_json for item in record.run.config.update
                }
                assert configured["optim.lr"] == "0.01"
    steps = read_course(tmp_path / "runs/small/metrics.jsonl").steps
    assert losses == {step["step"]: pytest.approx(step["loss"]) for step in steps}
