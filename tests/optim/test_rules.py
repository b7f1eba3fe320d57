"""What keeps updates in bounds, tensor by tensor, is the same on every layout and does what its source says."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megalm.config import OptimConfig
from megalm.config.compose import compose_config
from megalm.config.optim import AdaptiveClipConfig
from megalm.launch.resolve import resolve
from megalm.optim.adaptive_clip import AdaGC, ZClip
from megalm.optim.moments import Rewarming
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.train.hooks import Hook
from megalm.train.parts import build_trainer
from tests.distributed import run_ranks
from tests.small_run import small_run

RULES = {
    "update_clip": ["optim.update_clip=true", "optim.betas=[0.9,0.999]"],
    "adagc": ["optim.adaptive_clip.kind=adagc", "optim.adaptive_clip.warmup_steps=3"],
    "qk_clip": ["optim.qk_clip=0.05"],
    "reset": ["optim.reset_every=3", "optim.reset_warmup_steps=2"],
}
TOGETHER = [*RULES["update_clip"], *RULES["adagc"], *RULES["qk_clip"], *RULES["reset"]]
LAYOUTS = {
    "data": [],
    "zero2": ["parallel=zero2"],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "fully_shard": ["parallel.data_mode=fully_shard"],
}


class Keep(Hook):
    def __init__(self):
        self.signals = []

    def on_gradients(self, trainer, signals):
        self.signals.append(signals)
        return True


def arguments(folder, overrides, steps=8):
    return [*small_run(Path(folder)), f"train.steps={steps}", "train.eval_every=0", *overrides]


def train(folder, overrides, steps=8):
    return run_trainer(arguments(folder, overrides, steps), 1)


def run_trainer(overrides, world):
    config = compose_config(overrides)
    resolve(config, world)
    run = Path(config.run.dir) / config.run.name
    run.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(
        config, build_mesh(config.parallel, "cpu") if world > 1 else Mesh.single(), run, peak_flops=1e11
    )
    keep = Keep()
    trainer.hooks.append(keep)
    trainer.train()
    return [s.loss for s in keep.signals], keep.signals, trainer


def on_ranks(overrides):
    losses, signals, _ = run_trainer(overrides, 2)
    return losses, [(s.update_rms, s.attention_logit, s.loss_spread, s.worst_rank) for s in signals]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    found = {"plain": train(tmp_path_factory.mktemp("plain"), [])}
    for rule, overrides in {**RULES, "together": TOGETHER}.items():
        found[rule] = train(tmp_path_factory.mktemp(rule), overrides)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_changes_the_run(alone, rule):
    plain, ruled = np.array(alone["plain"][0]), np.array(alone[rule][0])
    assert abs(plain - ruled).max() > 1e-4 and np.isfinite(ruled).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rules_are_the_same_on_every_layout(tmp_path, alone, layout):
    expected, signals, _ = alone["together"]
    (losses, measured), (others, same) = run_ranks(2, on_ranks, arguments(tmp_path, [*TOGETHER, *LAYOUTS[layout]]))
    assert losses == others and measured == same
    assert losses == pytest.approx(expected, abs=2e-5)
    for (update, logit, spread, worst), one in zip(measured, signals, strict=True):
        assert update == pytest.approx(one.update_rms, rel=1e-3)
        assert logit == pytest.approx(one.attention_logit, rel=1e-3)
        assert (spread is not None and spread >= 0 and worst in (0, 1)) == (layout not in ("tensor", "pipeline"))


def test_update_clipping_divides_by_the_root_mean_square_of_each_tensor(tmp_path):
    _, _, trainer = train(tmp_path, RULES["update_clip"], steps=3)
    optimizer = trainer.optimizer
    before = {box.name: box.tensor.clone() for box in trainer.boxes()}
    optimizer.begin_step(1)
    for chunk in trainer.model_chunks:
        for i, parameter in enumerate(chunk.parameters()):
            torch.manual_seed(i)
            parameter.grad = None
            (parameter * torch.randn_like(parameter) * 10 ** (i % 5 - 2)).sum().backward()
    optimizer.finish_gradients()
    optimizer.statistics()
    lr, (beta1, beta2), eps, step = 1e-2, (0.9, 0.999), 1e-8, optimizer.step_count + 1
    gradients = {}
    for part in optimizer.parts():
        for s in part.stretches:
            gradients[s.piece.name] = part.gradient()[s.start : s.stop].clone()
    optimizer.step(lr)
    slowed = 0
    for box in trainer.boxes():
        if box.name.startswith("optimizer."):
            continue
        g = gradients[box.name].view_as(box.tensor).double()
        m = beta1 * before[f"optimizer.exp_avg.{box.name}"] + (1 - beta1) * g
        v = (beta2 * before[f"optimizer.exp_avg_sq.{box.name}"] + (1 - beta2) * g**2) / (1 - beta2**step)
        rms = (g**2 / v.clamp_min(eps**2)).mean().sqrt().item()
        rate = lr / max(1.0, rms)
        slowed += rms > 1.5
        decay = 0.1 if box.tensor.dim() == 2 and "embedding" not in box.name else 0.0
        expected = before[box.name] * (1 - rate * decay) - rate * m / (1 - beta1**step) / (v.sqrt() + eps)
        assert torch.allclose(box.tensor.double(), expected, atol=1e-6), box.name
    assert slowed > 3


def test_adagc_bounds_each_tensor_by_its_own_past():
    clip = AdaGC(AdaptiveClipConfig("adagc", 1.05, 0.9, 2), 1.0, ["a", "b"])
    assert clip.factor(4.0) == pytest.approx(0.25)
    assert clip.tensor_factors(np.array([2.0, 1.0])).tolist() == [1, 1]
    assert clip.tensor_factors(np.array([1.0, 3.0])).tolist() == [1, 1]
    assert clip.factor(4.0) == 1.0, "after its warm-up the whole gradient is left alone"
    assert clip.tensor_factors(np.array([1.0, 10.0])) == pytest.approx([1, 0.105])
    again = AdaGC(AdaptiveClipConfig("adagc", 1.05, 0.9, 2), 1.0, ["b", "a"])
    again.load_state(clip.state())
    assert again.usual == pytest.approx([0.9 * 1 + 0.1 * 1.05, 1.0])


def test_zclip_brings_an_outlier_near_the_mean():
    clip = ZClip(AdaptiveClipConfig("zclip", 2.5, 0.97, 25), 0.0)
    random = np.random.default_rng(0)
    for _ in range(100):
        assert 0.5 < clip.factor(float(1 + 0.1 * random.standard_normal())) <= 1.0
    mean, deviation = clip.mean, math.sqrt(clip.variance)
    kept = 10.0 * clip.factor(10.0)
    assert kept == pytest.approx(mean + 2.5**2 / ((10 - mean) / deviation) * deviation, rel=1e-3)
    again = ZClip(AdaptiveClipConfig("zclip", 2.5, 0.97, 25), 0.0)
    again.load_state(clip.state())
    assert again.factor(5.0) == clip.factor(5.0)


def test_logits_stay_below_the_limit(tmp_path):
    (_, free, _), (_, clipped, _) = (
        train(tmp_path / name, ["optim.lr=5e-2", "optim.min_lr=5e-2", *more], steps=30)
        for name, more in (("free", []), ("clipped", ["optim.qk_clip=2"]))
    )
    assert free[-1].attention_logit > 6
    assert np.median([s.attention_logit for s in clipped[-10:]]) < 4


LATENT = [
    "model.num_heads=4", "model.num_kv_heads=4", "model.latent.query_rank=16", "model.latent.key_rank=16",
    "model.latent.plain_dim=8", "model.latent.rope_dim=4", "model.latent.value_dim=8", "model.position=rope",
]  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
def test_heads_of_latent_attention_are_clipped_without_the_keys_that_they_share(tmp_path, world):
    words = arguments(tmp_path, [*LATENT, "optim=muonclip", "optim.qk_clip=2", "guard=off"], steps=6)
    if world == 2:
        words = [*words, "parallel.tensor=2", "run.name=two"]
    for before, after, own in run_ranks(world, clip_latent, words, world):
        factor = torch.ones(4)
        factor[1], factor[3] = 2 / 8, 2 / 3
        for name, exponents in (("query_up", [0.5] * 8 + [1.0] * 4), ("key_value_up", [0.5] * 8 + [0.0] * 8)):
            name = f"layers.0.attention.{name}.weight"
            wanted = torch.stack([factor[h].pow(torch.tensor(exponents)) for h in own]).flatten().unsqueeze(1)
            torch.testing.assert_close(after[name], before[name] * wanted)
        for name in before:
            if "query_up" not in name and "key_value_up" not in name:
                assert torch.equal(before[name], after[name]), name


def clip_latent(words, world):
    """Masters before and after a clip of the first layer's heads 1 and 3, and this rank's heads."""
    config = compose_config(words)
    resolve(config, world)
    mesh = build_mesh(config.parallel, "cpu")
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, mesh, folder)
    own = list(range(4))[mesh.tensor.rank * 4 // world : (mesh.tensor.rank + 1) * 4 // world]
    layers = len(trainer.measurement.attention)
    largest = torch.tensor(
        [(8.0 if head == 1 else 3.0 if head == 3 else 1.0) for head in own] + [1.0] * ((layers - 1) * len(own))
    )
    before = {box.name: box.tensor.clone() for box in trainer.boxes()}
    trainer.logit_clip.apply(largest, 2.0)
    after = {box.name: box.tensor.clone() for box in trainer.boxes()}
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return before, after, own


def test_latent_attentions_logits_stay_below_the_limit(tmp_path):
    (_, free, _), (_, clipped, _) = (
        train(tmp_path / name, [*LATENT, "optim.lr=5e-2", "optim.min_lr=5e-2", *more], steps=30)
        for name, more in (("free", []), ("clipped", ["optim.qk_clip=2"]))
    )
    assert free[-1].attention_logit > 2 * np.median([s.attention_logit for s in clipped[-10:]])


def test_the_learning_rate_comes_back_after_the_moments_started_anew(tmp_path):
    rewarming = Rewarming(OptimConfig(reset_every=500, reset_warmup_steps=150))
    assert rewarming.factor(0) == 1.0 and rewarming.due(500) and not rewarming.due(499)
    rewarming.begin()
    factors = [rewarming.factor(n) for n in range(200)]
    assert 0 < factors[0] < 1e-3 and factors[150] == 1.0 and factors == sorted(factors)
    _, _, trainer = train(tmp_path, RULES["reset"], steps=6)
    assert trainer.optimizer.step_count == 0 and trainer.optimizer.rewarming.resets == 2
    assert all(not box.tensor.any() for box in trainer.boxes() if box.name.startswith("optimizer."))
