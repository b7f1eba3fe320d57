"""A reward model: where it reads, what it minimises and watches, and the same run on every layout."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalm.architecture.tensors import VALUE_HEAD, count_parameters
from megalm.config.compose import compose_config
from megalm.config.objective import RewardConfig
from megalm.data.batch import Batch
from megalm.data.loader import Loader
from megalm.launch.resolve import resolve
from megalm.model.transformer import Transformer
from megalm.objectives.registry import build_objective
from megalm.objectives.reward import BINS, Reward
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.train.parts import build_trainer
from tests.distributed import run_ranks
from tests.objectives.test_preference import LAYOUTS
from tests.posttrain.pairs import pair_run, write_pairs

NAMES = ("loss", "grad_norm", "reward/margin", "reward/accuracy", "reward/calibration", "reward/length_correlation")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def reward_run(folder, data, *words):
    kept = [word for word in pair_run(folder, data) if not word.startswith("objective")]
    return [*kept, "objective=reward", "optim.weight_decay=0", *words]


def train(world, words, folder, steps):
    folder.mkdir(exist_ok=True)
    config = compose_config(words)
    resolve(config, world)
    trainer = build_trainer(config, build_mesh(config.parallel, "cpu"), folder)
    records = [trainer.train_step() for _ in range(steps)]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return [tuple(record[name] for name in NAMES) for record in records]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_are_the_same_on_every_layout(tmp_path, data, layout):
    words = reward_run(tmp_path, data, "parallel.sequence=true")
    (alone,) = run_ranks(1, train, 1, words, tmp_path / "alone", 10)
    for found in run_ranks(2, train, 2, [*words, *LAYOUTS[layout]], tmp_path / "split", 10):
        for step, wanted in zip(found, alone, strict=True):
            assert step[1] == pytest.approx(wanted[1], rel=1e-4)
            assert step == pytest.approx((wanted[0], step[1], *wanted[2:]), rel=1e-5, abs=1e-5)
    assert alone[-1][0] < alone[0][0] and alone[-1][3] > 0.7


def test_the_reward_is_read_at_the_last_target_of_each_answer(tmp_path, data):
    """Against a plain computation: each answer by itself, the head on its end token."""
    config = compose_config(reward_run(tmp_path, data, "train.global_batch_size=4", "train.micro_batch_size=4"))
    resolve(config, 1)
    torch.manual_seed(0)
    network = Transformer(config.model, LayerContext(Mesh.single()), objective=build_objective(config))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    loader = Loader(config, Mesh.single().data)
    (batch,) = loader.next()
    loader.close()
    total, sums = network(None, batch)
    losses, rewards = [], []
    for row in range(4):
        for pair in range(int(batch.counted[row].sum())):
            for answer in (2 * pair, 2 * pair + 1):
                inside = batch.document_ids[row] == answer
                ids = batch.tokens[row][inside]
                single = Batch(ids[None], ids[None])
                hidden = network.head.final_norm(network.run_layers(network.embed(single), single))[:, 0]
                end = int(batch.loss_mask[row][inside].nonzero().max()) + 1
                assert ids[end] == 4, "the token that ends what the assistant says"
                rewards.append(hidden[end] @ network.head.value_head.weight[0])
            better, worse = rewards[-2:]
            losses.append(-F.logsigmoid(better - worse) + 0.01 * (better + worse) ** 2)
    plain = torch.stack(losses).sum()
    assert sums["loss"].item() == pytest.approx(plain.item(), rel=1e-5)
    gaps = torch.stack(rewards).detach().view(-1, 2) @ torch.tensor([1.0, -1.0])
    assert sums["reward/accuracy"].item() == (gaps > 0).sum() and sums["pairs"] == len(losses)
    parameters = list(network.parameters())
    wanted = torch.autograd.grad(plain, parameters, materialize_grads=True)
    for found, other in zip(torch.autograd.grad(total, parameters, materialize_grads=True), wanted, strict=True):
        assert torch.allclose(found, other, atol=1e-4 * float(other.abs().max()) + 1e-7)


def test_calibration_and_correlation_are_those_of_the_whole_step():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (4, 3, 2), generator=generator).double() + rewards
    counted = torch.tensor([[1.0, 1.0, 0.0]] * 4)
    watched = Reward._watch(rewards, lengths, counted)
    found = Reward(RewardConfig()).derive({"pairs": np.array([8.0]), **{n: v.numpy() for n, v in watched.items()}})
    there = counted.bool()
    flat = [part[there].flatten().numpy() for part in (rewards, lengths)]
    assert found["reward/length_correlation"] == pytest.approx(np.corrcoef(*flat)[0, 1])
    gap = (rewards[there][:, 0] - rewards[there][:, 1]).tolist()
    sure = [1 / (1 + math.exp(-abs(g))) for g in gap]
    bins = [min(int((s - 0.5) * 2 * BINS), BINS - 1) for s in sure]
    error = 0.0
    for b in set(bins):
        inside = [k for k in range(len(gap)) if bins[k] == b]
        error += abs(sum(sure[k] for k in inside) - sum(gap[k] > 0 for k in inside))
    assert found["reward/calibration"] == pytest.approx(error / len(gap))
    same = {"pairs": np.array([2.0]), "bins": np.zeros(3 * BINS), "moments": np.array([0.0, 4, 0, 4, 0])}
    assert "reward/length_correlation" not in Reward(RewardConfig()).derive(same)


def test_the_planner_and_the_model_know_the_value_head(tmp_path, data):
    config = compose_config(reward_run(tmp_path, data))
    assert config.model.value_head
    network = Transformer(config.model, LayerContext(Mesh.single()))
    counted = dict(count_parameters(config.model).tensors)
    assert counted[VALUE_HEAD] == (1, 32)
    assert sum(p.numel() for p in network.parameters()) == count_parameters(config.model).total
