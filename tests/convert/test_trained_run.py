"""From a training run to other libraries and back into a training run."""

import shutil
from pathlib import Path

import pytest
import torch

from megalm.config.compose import compose_config
from megalm.config.saved import write_config_yaml
from megalm.convert.formats import open_source
from megalm.generate.model import build_model, compute_logits
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import build_mesh
from megalm.train.hooks import Hook
from megalm.train.parts import build_trainer
from tests.convert.architectures import transformers
from tests.distributed import run_ranks
from tests.small_run import small_run
from tools.convert.__main__ import main as convert


class Recorder(Hook):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.first_weights: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer):
        self.first_weights = {box.name: box.tensor.clone() for box in trainer.boxes() if "optimizer" not in box.name}

    def on_step_end(self, trainer, record):
        self.losses.append(record["loss"])


def train(overrides: list[str], world_size: int = 1) -> Recorder:
    config = compose_config(overrides)
    resolve(config, world_size)
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(write_config_yaml(config))
    trainer = build_trainer(config, build_mesh(config.parallel, "cpu"), folder)
    recorder = Recorder()
    trainer.hooks.append(recorder)
    assert trainer.train() == 0
    return recorder


def _train_on_ranks(overrides: list[str]) -> list[float]:
    return train(overrides, 2).losses


def check_export(run: Path, exported: Path) -> None:
    """transformers computes with the exported folder what megalm computes with the run."""
    assert convert([str(run), str(exported), "--to", "huggingface"]) == 0
    source = open_source(run)
    assert source.step == 6
    tokens = torch.arange(32)[None] * 7 % 64
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(exported)(tokens).logits
    torch.testing.assert_close(
        compute_logits(build_model(source.model, source.weights), tokens), expected, rtol=0, atol=1e-4
    )


def test_a_run_exports_and_its_export_starts_another_run(tmp_path):
    train(small_run(tmp_path))
    run = tmp_path / "runs" / "small"
    check_export(run, tmp_path / "hf")
    assert convert([str(tmp_path / "hf"), str(tmp_path / "imported"), "--to", "megalm"]) == 0
    again = train(
        small_run(
            tmp_path,
            "run.name=continued",
            "checkpoint.load=weights",
            f"checkpoint.load_path={tmp_path}/imported/checkpoints",
        )
    )
    trained = open_source(run).weights
    assert again.first_weights.keys() == set(trained.names())
    for name, tensor in again.first_weights.items():
        assert torch.equal(tensor, trained.read(name)), name


@pytest.mark.parametrize("layout", [["parallel.tensor=2"], ["parallel.pipeline=2", "model.tie_embeddings=true"]])
def test_a_run_over_two_ranks_exports(layout, tmp_path):
    run_ranks(2, _train_on_ranks, small_run(tmp_path, "world_size=2", *layout))
    check_export(tmp_path / "runs" / "small", tmp_path / "hf")


def test_checkpoints_kept_elsewhere_are_found(tmp_path):
    train(small_run(tmp_path, f"checkpoint.path={tmp_path}/elsewhere"))
    assert not (tmp_path / "runs" / "small" / "checkpoints").exists()
    check_export(tmp_path / "runs" / "small", tmp_path / "hf")


def test_a_merged_checkpoint_resumes_bitwise(tmp_path):
    undisturbed = train(small_run(tmp_path)).losses
    run = tmp_path / "runs" / "small"
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert convert(["reshard", str(run), str(tmp_path / "runs" / "merged")]) == 0
    assert len(list((tmp_path / "runs" / "merged" / "checkpoints" / "step-00000003").glob("*.distcp"))) == 1
    assert train(small_run(tmp_path, "run.name=merged")).losses == undisturbed[3:]
