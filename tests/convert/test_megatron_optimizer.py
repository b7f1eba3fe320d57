"""The state of Megatron-LM's optimizer in torch_dist checkpoints, in both directions, and training on from it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megalm.checkpoint.reader import CheckpointReader
from megalm.config.compose import compose_config
from megalm.convert.formats import open_source
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import Mesh
from megalm.train.parts import build_trainer
from megalm.train.resume import resume
from tests.convert.megatron_checkpoints import MODELS, make_model, random_weights, stacked_state, write_torch_dist
from tools.bench.layouts.layouts import write_tokens
from tools.convert.__main__ import main as convert


def write(folder, model):
    """(the folder, the three states by kind); the weights are the rounded fp32 ones."""
    kinds = {kind: random_weights(model, seed) for seed, kind in enumerate(("param", "exp_avg", "exp_avg_sq"), start=1)}
    kinds["exp_avg_sq"] = {name: tensor.square() for name, tensor in kinds["exp_avg_sq"].items()}
    rounded = {name: tensor.bfloat16() for name, tensor in kinds["param"].items()}
    return write_torch_dist(folder, rounded, model, optimizer=kinds), kinds


def expected(kinds):
    prefixes = {"param": "", "exp_avg": "optimizer.exp_avg.", "exp_avg_sq": "optimizer.exp_avg_sq."}
    return {prefixes[kind] + name: tensor for kind, values in kinds.items() for name, tensor in values.items()}


@pytest.mark.parametrize("name", MODELS)
def test_state_comes_over_and_goes_back(name, tmp_path, capsys):
    model = make_model(**MODELS[name])
    source, kinds = write(tmp_path / "theirs", model)
    command = [str(source), str(tmp_path / "run"), "--to", "megalm", "--vocab-size", "50", "--optimizer", "--verify"]
    assert convert(command) == 0
    said = capsys.readouterr().out
    assert "after 299 updates" in said and "every weight has the source's bits" in said
    reader = CheckpointReader(tmp_path / "run")
    assert set(reader.names(optimizer=True)) == set(expected(kinds))
    assert all(torch.equal(reader.tensor(key), value) for key, value in expected(kinds).items())
    assert reader.state()["optimizer"] == {"step": 299} and reader.state()["tokens"] == 1200 * model.seq_length
    again = [
        str(tmp_path / "run"),
        str(tmp_path / "again"),
        "--to",
        "megatron",
        "--torch-dist",
        "--optimizer",
        "--verify",
    ]
    assert convert([*again, "--pad-vocabulary", "64", "--dtype", "bfloat16"]) == 0
    stored = {
        f"optimizer.state.{kind}.{key}": t for kind, w in kinds.items() for key, t in stacked_state(w, model).items()
    }
    found = {key: torch.full_like(tensor, float("nan")) for key, tensor in stored.items()}
    dcp.load(found, checkpoint_id=tmp_path / "again" / "iter_0000300", no_dist=True)  # as torch itself reads it
    for key, tensor in stored.items():
        rows = 50 if "word_embeddings" in key or "output_layer" in key else len(tensor)
        assert torch.equal(found[key][:rows], tensor[:rows]) and not found[key][rows:].any(), key
    state = open_source(tmp_path / "again", vocab_size=50).optimizer
    assert state.step == 299 and state.tokens == 1200 * model.seq_length


def test_training_goes_on_from_it(tmp_path):
    model = make_model(vocab_size=50)
    source, kinds = write(tmp_path / "theirs", model)
    convert([str(source), str(tmp_path / "run"), "--to", "megalm", "--vocab-size", "50", "--optimizer"])
    config = compose_config(
        [f"+model={tmp_path}/run/model.yaml", f"checkpoint.load_path={tmp_path}/run", "train.steps=301", "device=cpu"]
        + [f"data.train=[{write_tokens(tmp_path, 50)}]", "data.tokenizer=null", "train.sample=false"]
        + ["train.global_batch_size=2", "train.micro_batch_size=2", "train.eval_every=0", "optim.warmup_steps=0"]
    )
    resolve(config, 1)
    (tmp_path / "on").mkdir()
    trainer = build_trainer(config, Mesh.single(), tmp_path / "on")
    resume(trainer)
    assert (trainer.step, trainer.optimizer.step_count) == (300, 299)
    assert all(torch.equal(box.tensor, expected(kinds)[box.name]) for box in trainer.boxes())
    assert trainer.train() == 0 and trainer.step == 301 and trainer.optimizer.step_count == 300


def test_what_cannot_be_converted_is_said(tmp_path, capsys):
    model = make_model()
    plain = write_torch_dist(tmp_path / "plain", random_weights(model), model)
    assert convert([str(plain), str(tmp_path / "run"), "--to", "megalm", "--optimizer"]) == 2
    assert "holds no state of an optimizer that can be converted" in capsys.readouterr().err
    assert convert([str(plain), str(tmp_path / "hf"), "--to", "huggingface", "--optimizer"]) == 2
    assert "optimizer=True has no meaning for huggingface" in capsys.readouterr().err
