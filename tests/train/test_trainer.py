"""The training run: it learns, resumes bitwise, and gives the same losses on one rank and on two."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.checkpointer import Checkpointer
from megalm.config.compose import compose_config
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.train.determinism import choose_algorithms
from megalm.train.hooks import Hook
from megalm.train.parts import build_trainer
from megalm.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.small_run import small_run


class Recorder(Hook):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.records: list[dict] = []

    def on_step_end(self, trainer, record):
        self.losses.append(record["loss"])
        self.records.append(record)


def train(overrides: list[str], *hooks: Hook, mesh: Mesh | None = None) -> tuple[Trainer, Recorder, int]:
    config = compose_config(overrides)
    resolve(config, mesh.world_size if mesh else 1)
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    mesh = mesh or Mesh.single()
    trainer = build_trainer(config, mesh, folder, peak_flops=1e11)
    recorder = Recorder()
    trainer.hooks += [recorder, *hooks]
    return trainer, recorder, trainer.train()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {box.name: box.tensor.clone() for box in trainer.boxes()}


def test_the_loss_falls_and_the_record_is_complete(tmp_path):
    _, recorder, status = train(small_run(tmp_path, "train.steps=25"))
    assert status == 0
    assert recorder.losses[0] == pytest.approx(torch.tensor(64.0).log().item(), abs=0.2)
    assert recorder.losses[-1] < recorder.losses[0] - 1.0
    named = "step loss grad_norm lr lr_scale tokens samples step_time_s tokens_per_s mfu hfu loss_scale skipped"
    assert set(named.split()) <= set(recorder.records[0])
    assert recorder.records[-1]["tokens"] == 25 * 8 * 32 and "eval/loss" in recorder.records[-1]


def test_a_resumed_run_is_bitwise_the_undisturbed_one(tmp_path):
    overrides = small_run(tmp_path, "model.dropout=0.1")
    whole, undisturbed, _ = train(overrides)
    expected = weights(whole)
    shutil.rmtree(tmp_path / "runs/small/checkpoints/step-00000006")
    resumed, again, _ = train(overrides)
    assert again.losses == undisturbed.losses[3:]
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name


class StopAfter(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_start(self, trainer):
        if trainer.step + 1 == self.step:
            trainer.control.request_stop()


def test_on_another_layout_random_numbers_are_new_at_each_step(tmp_path, monkeypatch):
    """Another layout has no streams to go on with; those of the run's first steps must not come again."""
    load = Checkpointer.load
    monkeypatch.setattr(Checkpointer, "load", lambda *given, **more: (load(*given, **more)[0], None))
    streams = []

    class Look(Hook):
        def on_train_start(self, trainer):
            streams.append(torch.randint(1 << 62, (1000,)))

    for steps in (3, 4, 5):  # begins anew, and goes on at steps 3 and 4
        train(small_run(tmp_path, f"train.steps={steps}"), Look())
    train(small_run(tmp_path, "train.steps=5", "run.name=same"), Look())
    assert torch.equal(streams[0], streams[3])
    seen = torch.cat(streams[:3]).tolist()
    assert len(set(seen)) == len(seen), "no number of one is in another"


def test_an_interrupted_run_saves_and_goes_on(tmp_path):
    _, undisturbed, _ = train(small_run(tmp_path, "run.name=whole"))
    _, before, status = train(small_run(tmp_path), StopAfter(2))
    assert status == 130 and (tmp_path / "runs/small/checkpoints/step-00000002").is_dir()
    _, after, status = train(small_run(tmp_path))
    assert status == 0
    assert before.losses + after.losses == undisturbed.losses


class RefuseSecond(Hook):
    def on_gradients(self, trainer, signals):
        return trainer.step != 1


def test_a_refused_update_changes_no_weight(tmp_path):
    before: dict[str, torch.Tensor] = {}

    class Look(RefuseSecond):
        def on_step_start(self, trainer):
            if trainer.step == 1:
                before.update(weights(trainer))
            if trainer.step == 2:
                assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())

    _, recorder, _ = train(small_run(tmp_path), Look())
    assert [record["skipped"] for record in recorder.records] == [0, 1, 0, 0, 0, 0]


def _on_ranks(overrides: list[str]) -> list[float]:
    config = compose_config(overrides)
    resolve(config, 2)
    mesh = build_mesh(config.parallel, "cpu")
    _, recorder, _ = train(overrides, mesh=mesh)
    return recorder.losses


@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"], ["parallel.pipeline=2"], ["parallel=zero1"]])
def test_two_ranks_follow_the_losses_of_one(tmp_path, layout):
    _, alone, _ = train(small_run(tmp_path))
    both = run_ranks(2, _on_ranks, small_run(tmp_path, "run.name=both", *layout))
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone.losses, rel=1e-5)


def test_bf16_follows_fp32(tmp_path):
    _, exact, _ = train(small_run(tmp_path))
    _, narrow, _ = train(small_run(tmp_path, "precision=bf16", "run.name=bf16"))
    assert narrow.losses == pytest.approx(exact.losses, rel=0.02)


def test_signals_are_left_as_they_were(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(small_run(tmp_path, "train.steps=2"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_events_tell_what_happened(tmp_path):
    train(small_run(tmp_path))
    events = [json.loads(line) for line in (tmp_path / "runs/small/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "checkpoint"] == [3, 6]


def test_an_error_at_the_start_is_the_one_that_is_seen(tmp_path):
    class Broken(Hook):
        def on_train_start(self, trainer):
            raise RuntimeError("no disk")

    class Ended(Hook):
        def on_train_end(self, trainer, status):
            raise AssertionError("it never started")

    with pytest.raises(RuntimeError, match="no disk"):
        train(small_run(tmp_path), Broken(), Ended())


@pytest.mark.parametrize("determinism", ["strict", "fast"])
def test_on_a_gpu_what_is_not_deterministic_is_an_error(determinism, monkeypatch):
    """torch's attention computes its gradients in a fixed order only if nondeterminism is an error, not a warning."""
    before, wanted = torch.get_deterministic_debug_mode(), determinism == "strict"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        choose_algorithms(determinism, torch.device("cuda", 0))
        assert torch.get_deterministic_debug_mode() == (2 if wanted else 0)
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
        choose_algorithms(determinism, torch.device("cpu"))
        assert torch.get_deterministic_debug_mode() == (1 if wanted else 0)
    finally:
        torch.set_deterministic_debug_mode(before)
