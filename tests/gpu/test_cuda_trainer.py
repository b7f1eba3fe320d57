"""Whole steps on a GPU: the CPU's weights and losses, the same bits in every run, one wait of the host, exact restarts."""

import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("hydra", reason="runs are composed by Hydra")

from megalm.config.compose import compose_config  # noqa: E402
from megalm.generate.generate import generate  # noqa: E402
from megalm.launch.resolve import resolve  # noqa: E402
from megalm.parallel.mesh import Mesh  # noqa: E402
from megalm.train.hooks import Hook  # noqa: E402
from megalm.train.parts import build_trainer  # noqa: E402
from megalm.train.resume import resume  # noqa: E402
from tests.small_run import small_run  # noqa: E402

SHAPES = {
    "llama": [],
    "mpt": ["model.position=alibi", "model.activation=gelu", "model.norm=layernorm", "model.dropout=0.1"],
    "gpt2": ["model.position=learned", "model.activation=gelu_tanh", "model.norm=layernorm", "model.linear_bias=true"],
    "olmo": [
        "model.norm_placement=post",
        "model.qk_norm=true",
        "model.qk_norm_scope=full",
        "model.tie_embeddings=false",
    ],
    "documents": ["data.packing=documents", "model.qk_norm=true"],
    "stable": ["optim=stable", "optim.adaptive_clip.kind=adagc"],
    "recomputed": ["parallel.recompute=selective", "model.z_loss=1e-4"],
}


class Losses(Hook):
    def __init__(self):
        self.values = []

    def on_step_end(self, trainer, record):
        self.values.append(record["loss"])


def make(folder, device, *words):
    config = compose_config(small_run(folder, *words))
    resolve(config, 1)
    run = Path(config.run.dir) / config.run.name
    run.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, Mesh.single(device), run, peak_flops=1e12)
    trainer.hooks.append(Losses())
    return trainer


def weights(trainer):
    trainer.optimizer.wait_weights()
    return {box.name: box.tensor.detach().cpu().clone() for box in trainer.boxes()}


def train(folder, device, *words):
    """(losses, weights and moments) of a whole run."""
    trainer = make(folder, device, *words)
    assert trainer.train() == 0
    return trainer.hooks[0].values, weights(trainer)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_in_fp32_is_the_cpus(device, tmp_path, shape):
    words = [*SHAPES[shape], "train.steps=3", "checkpoint.every=0"]
    # One after the other: both draw from the process' generators.
    there = make(tmp_path / "cpu", torch.device("cpu"), *words)
    first, _ = weights(there), there.train()
    here = make(tmp_path / "gpu", device, *words)
    for name, tensor in weights(here).items():
        assert torch.equal(first[name], tensor), f"{name} begins otherwise"
    assert here.train() == 0
    assert here.hooks[0].values == pytest.approx(there.hooks[0].values, rel=2e-4)
    ours, theirs = weights(here), weights(there)
    for name, tensor in theirs.items():
        # Where a gradient is about 0, Adam's first steps may go either way: 3 steps of at most lr 1e-2, on few elements.
        apart = (ours[name] - tensor).abs() > 1e-4 + 1e-3 * tensor.abs()
        assert apart.float().mean() < 0.02, name


@pytest.mark.parametrize("shape", ["llama", "mpt", "documents"])
def test_a_run_in_bf16_is_near_the_cpus_in_fp32(device, tmp_path, shape):
    words = [*SHAPES[shape], "model.dropout=0", "train.steps=6", "checkpoint.every=0"]
    losses, _ = train(tmp_path / "gpu", device, "precision=bf16", *words)
    truth, _ = train(tmp_path / "cpu", torch.device("cpu"), *words)
    assert losses == pytest.approx(truth, abs=0.05)  # nats; bf16 keeps 8 bits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["llama", "mpt", "documents", "recomputed"])
def test_two_runs_are_the_same_bit_by_bit(device, tmp_path, shape, precision):
    """What the guard's replay rests on; attention's gradients, too (long rows: its kernels then split them)."""
    words = [*SHAPES[shape], f"precision={precision}", "model.seq_length=256", "train.steps=3", "checkpoint.every=0"]
    one, other = (train(tmp_path / name, device, *words) for name in ("one", "other"))
    assert one[0] == other[0]
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(device, tmp_path, precision):
    words = [f"precision={precision}", "model.dropout=0.1"]
    losses, expected = train(tmp_path, device, *words)
    shutil.rmtree(tmp_path / "runs/small/checkpoints/step-00000006")
    again, found = train(tmp_path, device, *words)
    assert again == losses[3:]
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_the_gpu_is_read_on_the_cpu(device, tmp_path):
    _, expected = train(tmp_path, device)
    elsewhere = make(tmp_path, torch.device("cpu"))
    resume(elsewhere)
    assert elsewhere.step == 6
    for name, tensor in weights(elsewhere).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_step_waits_for_the_host_once(device, tmp_path):
    if device.type != "cuda":
        pytest.skip("about the GPU's queue")
    from megalm.guard.hook import GuardHook

    trainer = make(tmp_path, device, "precision=bf16", "train.steps=9", "train.eval_every=0", "checkpoint.every=0")
    guard = GuardHook(trainer.config.guard)
    trainer.hooks.append(guard)
    guard.on_train_start(trainer)
    for _ in range(3):
        trainer.train_step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    assert len(waits) == 1, waits


def test_greedy_text_is_the_cpus(device, tmp_path):
    texts = []
    for where in (device, torch.device("cpu")):
        trainer = make(tmp_path / where.type, where, "model.seq_length=32")
        texts.append(generate(trainer.model_chunks[0], [1, 2, 3], max_tokens=40, temperature=0.0, seed=0))
        trainer.batch_source.close()
    assert texts[0] == texts[1]


def test_one_rank_under_a_launcher(device, tmp_path):
    """A process group of NCCL, as torchrun, Slurm or Kubernetes start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = small_run(tmp_path, "train.steps=2", "checkpoint.every=1", "world_size=1", f"device={device.type}")
    done = subprocess.run(
        [sys.executable, "-m", "megalm.launch", *words],
        env={**os.environ, **world},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
