"""Losses of pairs: by hand, against their authors' formulas, and the same run on every layout."""

import math

import pytest
import torch
import torch.nn.functional as F

from megalm.config.compose import compose_config
from megalm.config.errors import ConfigError
from megalm.config.objective import PreferenceConfig
from megalm.data.loader import Loader
from megalm.data.pair_batch import PairBatch
from megalm.launch.resolve import resolve
from megalm.objectives.preference import LOSSES, Answers, Compared, Preference
from megalm.objectives.registry import build_objective
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.posttrain.reference import make_preparing_hooks
from megalm.train.parts import build_trainer
from tests.distributed import run_ranks
from tests.posttrain.pairs import pair_run, write_pairs

LOGP = torch.tensor([[[-10.0, -12.0], [-8.0, -7.0]]], dtype=torch.float64)
REFERENCE = torch.tensor([[[-11.0, -11.5], [-8.5, -7.5]]], dtype=torch.float64)
TOKENS = torch.tensor([[[5.0, 6.0], [4.0, 2.0]]], dtype=torch.float64)
MARGIN = torch.tensor([[0.0, 0.2]], dtype=torch.float64)


def compared(logp=LOGP):
    answers = Answers(logp, TOKENS)
    ratio = logp - REFERENCE
    return Compared(ratio, ratio / TOKENS, answers.mean, MARGIN)


def by_hand(kind, logp, beta=0.3, e=0.1, gamma=0.5):
    """The loss of each pair with plain numbers."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    found = []
    for j in range(2):
        (c, r), (rc, rr) = logp[0, j].tolist(), REFERENCE[0, j].tolist()
        (nc, nr), m = TOKENS[0, j].tolist(), float(MARGIN[0, j])
        d = (c - rc) - (r - rr)
        norm = (c - rc) / nc - (r - rr) / nr
        z = beta * d - m
        odds = lambda mean: math.log(math.exp(mean) / (1 - math.exp(mean)))  # noqa: E731
        found.append({
            "sigmoid": -math.log(sigmoid(z)),
            "conservative": -(1 - e) * math.log(sigmoid(z)) - e * math.log(sigmoid(-z)),
            "robust": (-(1 - e) * math.log(sigmoid(z)) + e * math.log(sigmoid(-z))) / (1 - 2 * e),
            "hinge": max(0.0, 1 - z),
            "ipo": (norm - 1 / (2 * beta)) ** 2,
            "sigmoid_norm": -math.log(sigmoid(beta * norm - m)),
            "apo_zero": 1 - sigmoid(beta * (c - rc)) + sigmoid(beta * (r - rr)),
            "simpo": -math.log(sigmoid(beta * (c / nc - r / nr) - gamma - m)),
            "orpo": -c / nc - beta * math.log(sigmoid(odds(c / nc) - odds(r / nr))),
        }[kind])  # fmt: skip
    return found


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_is_its_formula(kind):
    settings = PreferenceConfig(loss=kind, beta=0.3, label_smoothing=0.1, target_margin=0.5)
    found = LOSSES[kind](compared(), settings)[0].tolist()
    assert found == pytest.approx(by_hand(kind, LOGP), rel=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_moves_the_chosen_answer_up(kind):
    logp = LOGP.clone().requires_grad_()
    settings = PreferenceConfig(loss=kind, beta=0.3, label_smoothing=0.1, target_margin=0.5)
    (gradient,) = torch.autograd.grad(LOSSES[kind](compared(logp), settings).sum(), logp)
    assert (gradient[..., 0] < 0).all()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def train(world, words, folder, steps):
    folder.mkdir(exist_ok=True)
    config = compose_config(words)
    resolve(config, world)
    mesh = build_mesh(config.parallel, "cpu")
    loader = Loader(config, mesh.data)
    hooks = make_preparing_hooks(config, loader)
    trainer = build_trainer(config, mesh, folder, batch_source=loader, hooks=hooks)
    for hook in hooks:
        hook.on_train_start(trainer)
    records = [trainer.train_step() for _ in range(steps)]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return [(r["loss"], r["grad_norm"], r.get("reward/margin"), r.get("reward/accuracy"), r["tokens"]) for r in records]


LAYOUTS = {
    "tensor": ("parallel.tensor=2",),
    "pipeline": ("parallel.pipeline=2",),
    "context": ("parallel.context=2",),
    "data": ("parallel.data=2",),
    "zero1": ("parallel.data=2", "parallel.zero_stage=1"),
    "zero2": ("parallel.data=2", "parallel.zero_stage=2"),
    "fully_shard": ("parallel.data=2", "parallel.data_mode=fully_shard"),
}


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "orpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_are_the_same_on_every_layout(tmp_path, data, layout, kind):
    if kind != "sigmoid" and layout not in ("tensor", "context"):
        pytest.skip("what the losses do with the sums is one code for all layouts")
    words = pair_run(tmp_path, data, f"objective.preference.loss={kind}", "run.name=alone")
    (alone,) = run_ranks(1, train, 1, words, tmp_path / "alone", 10)
    for path in data.parent.glob("*.reference-*"):  # each layout scores the reference by itself
        path.unlink()
    split = run_ranks(2, train, 2, [*words, *LAYOUTS[layout]], tmp_path / "split", 10)
    for found in split:
        assert_same(found, alone)
    assert alone[-1][0] < alone[0][0] and alone[-1][2] > alone[0][2]


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_ten_steps_are_the_same_for_every_split_into_micro_batches(tmp_path, data, micro_batch):
    words = pair_run(tmp_path, data)
    (wanted,) = run_ranks(1, train, 1, words, tmp_path / "a", 10)
    (found,) = run_ranks(1, train, 1, [*words, f"train.micro_batch_size={micro_batch}"], tmp_path / "b", 10)
    assert_same(found, wanted)


def assert_same(found, wanted):
    """Loss, gradient norm, margin, accuracy, tokens; at the first step every margin is 0, and rounding decides its sign."""
    for number, (step, other) in enumerate(zip(found, wanted, strict=True)):
        if number == 0:
            step, other = (*step[:3], *step[4:]), (*other[:3], *other[4:])
        assert step == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_the_first_loss_is_that_of_equal_models(tmp_path, data):
    ((first, *_),) = run_ranks(1, train, 1, pair_run(tmp_path, data), tmp_path / "run", 1)
    assert first[0] == pytest.approx(math.log(2), abs=1e-6) and first[2] == pytest.approx(0, abs=1e-6)


def test_packed_pairs_give_what_each_answer_gives_alone(tmp_path, data):
    """Against a plain computation: each answer by itself, through torch's cross-entropy."""
    from megalm.data.batch import Batch
    from megalm.model.transformer import Transformer
    from megalm.parallel.layer_context import LayerContext

    words = pair_run(tmp_path, data, "train.global_batch_size=4", "train.micro_batch_size=4")
    config = compose_config(words)
    resolve(config, 1)
    torch.manual_seed(0)
    network = Transformer(config.model, LayerContext(Mesh.single()), objective=build_objective(config))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    loader = Loader(config, Mesh.single().data)
    (batch,) = loader.next()
    loader.close()
    assert isinstance(batch, PairBatch) and batch.reference is None
    most = batch.counted.shape[1]
    assert most > 1 and batch.counted.sum() > 4
    torch.manual_seed(1)
    reference = -torch.rand(4, 2 * most, dtype=torch.float64) * 50
    total, sums = network(None, PairBatch(**{**vars(batch), "reference": reference}))
    plain = []
    for row in range(4):
        logp = []
        for answer in range(2 * int(batch.counted[row].sum())):
            inside = batch.document_ids[row] == answer
            single = Batch(batch.tokens[row][inside][None], batch.labels[row][inside][None])
            logits = network.head.logits(network.run_layers(network.embed(single), single))[:, 0, :320]
            losses = F.cross_entropy(logits, batch.labels[row][inside], reduction="none")
            logp.append(-(losses * batch.loss_mask[row][inside]).sum())
        ratio = (torch.stack(logp).double() - reference[row, : len(logp)]).view(-1, 2)
        plain.append(-F.logsigmoid(0.5 * (ratio[:, 0] - ratio[:, 1])))
    plain = torch.cat(plain)
    assert float(sums["pairs"]) == len(plain) and sums["loss"].item() == pytest.approx(plain.sum().item(), rel=1e-5)
    parameters = list(network.parameters())
    wanted = torch.autograd.grad(plain.sum(), parameters)
    for found, other in zip(torch.autograd.grad(total, parameters), wanted, strict=True):
        assert torch.allclose(found, other, atol=1e-4 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["objective.preference.label_smoothing=0.1"],
            "label_smoothing=0.1 is read by the losses conservative and robust",
        ),
        (["objective.preference.loss=dpo"], "not one of sigmoid, conservative"),
        (["data.packing=best_fit"], "preference learns from pairs of answers: set data.packing=pairs"),
        (["objective=sft", "objective.preference.beta=0.1"], "pairs are read by objective.name=preference"),
        (
            ["objective=sft", "data.packing=best_fit", "objective.preference.beta=1"],
            "objective.preference.beta is read by",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, data, words, said):
    with pytest.raises(ConfigError, match=said):
        compose_config(pair_run(tmp_path, data, *words))


def test_the_reference_is_asked_for_before_the_loss():
    objective = Preference(PreferenceConfig())
    assert "preference/kl" in objective.sums and "preference/kl" not in Preference(PreferenceConfig(loss="simpo")).sums
