"""A run goes on from its checkpoint on another layout as if nothing had happened; `tools.bench resume` has more pairs."""

import pytest
import torch

from megalm.checkpoint.reader import CheckpointReader
from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.parallel.mesh import Mesh
from megalm.train.parts import build_trainer
from tools.bench.checkpoint.resume import measure
from tools.bench.layouts.layouts import Layout, configure, write_tokens


def test_a_run_goes_on_on_another_layout(tmp_path):
    rows = list(measure("gpt2", tmp_path / "run", [("data 2 zero 1", "pipeline 2 1f1b")]))
    assert rows[0]["good"] and rows[0]["weight_difference"] < 1e-5 and rows[0]["moment_difference"] < 1e-4, rows


def test_a_run_begins_with_all_of_another_or_with_its_weights(tmp_path):
    tokens = write_tokens(tmp_path)

    def run(name, steps, **options):
        config = configure("llama", Layout(), tokens)
        config.train.steps = steps
        for key, value in options.items():
            setattr(config.checkpoint, key, value)
        (tmp_path / name).mkdir()
        trainer = build_trainer(config, Mesh.single(), tmp_path / name)
        told = []
        trainer.events.listeners.append(told.append)
        trainer.train()
        return CheckpointReader(tmp_path / name), told

    first, _ = run("first", 10, every=5, keep=0)
    half = str(tmp_path / "first" / "checkpoints" / "step-00000005")
    whole, told = run("whole", 10, load_path=half)
    assert [(event["kind"], event["step"]) for event in told] == [("resume", 5), ("checkpoint", 10)]
    assert all(torch.equal(tensor, first.tensor(name)) for name, tensor in whole.tensors(optimizer=True))
    weights, told = run("weights", 1, load_path=half, load="weights")
    assert told[0]["kind"] == "load_weights" and weights.step == 1
    assert not torch.equal(weights.tensor("embedding.weight"), CheckpointReader(half).tensor("embedding.weight"))


def test_weights_need_a_place_to_come_from():
    with pytest.raises(ConfigError, match="checkpoint.load=weights needs checkpoint.load_path"):
        compose_config(["+model=tiny", "checkpoint.load=weights"])
