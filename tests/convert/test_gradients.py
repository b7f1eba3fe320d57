"""A family is trained as transformers trains it: gradients of every tensor, then twenty updates."""

import pytest
import torch
import torch.nn.functional as F

from megalm.convert.families import FAMILIES
from megalm.convert.formats import open_source
from megalm.data.batch import Batch
from megalm.generate.model import build_model
from megalm.objectives.next_token import NextToken
from megalm.parallel.slices import slice_of
from tests.convert.architectures import NAMES, build, tokens
from tests.convert.test_same_losses import losses_of_megalm, losses_of_transformers

# Families that were there before windows, scales and caps are held in test_same_losses.
EARLIER = {"llama2", "llama3", "llama-linear-scaling", "llama-tied-biased", "mistral", "qwen2", "qwen3", "olmo2"}
EARLIER |= {"gpt2", "gpt2-relu-narrow", "pythia", "gpt-neox-sequential", "mpt", "mpt-six-heads"}
TRAINED = [name for name in NAMES if name not in EARLIER]
STEPPED = [
    "mistral-window",
    "olmo3",
    "smollm3",
    "granite",
    "gemma2",
    "gemma3",
    "phi3-long",
    "glm4",
    "cohere",
    "cohere2",
]
STEPPED += ["nemotron", "starcoder2", "mixtral", "olmoe", "qwen2-moe", "qwen3-moe", "glm4-moe", "gpt-oss", "dbrx"]
STEPPED += ["deepseek-v3", "deepseek-v3-no-query-rank"]


def imported(name, folder):
    peer = build(name)
    peer.save_pretrained(folder)
    source = open_source(folder)
    source.model.moe.balance_loss = 0.0  # transformers has none in its loss unless it is asked for
    return peer, source, build_model(source.model, source.weights)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_transformers(name, tmp_path):
    peer, source, model = imported(name, tmp_path)
    ids = tokens(2, 25)
    F.cross_entropy(peer(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    model.objective = NextToken()
    total, _ = model(None, Batch(tokens=ids[:, :-1], labels=ids[:, 1:]))
    (total / ids[:, 1:].numel()).backward()
    for parameter in peer.parameters():
        with torch.no_grad():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    peer.save_pretrained(tmp_path / "gradients")  # gradients in the place of weights: experts lie in files one by one
    wanted = open_source(tmp_path / "gradients").weights
    for parameter in model.parameters():
        for piece in slice_of(parameter).pieces:
            expected = wanted.read(piece.name)
            found = parameter.grad.narrow(0, piece.row, piece.shape[0])
            assert (found - expected).abs().max() <= 1e-3 * expected.abs().max(), piece.name


@pytest.mark.parametrize("name", STEPPED)
def test_twenty_updates_follow_transformers(name, tmp_path):
    peer, _, model = imported(name, tmp_path)
    expected, ours = losses_of_transformers(peer), losses_of_megalm(model)
    assert expected[-1] < expected[0] - 0.2
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 2e-4


def test_every_family_is_stepped():
    stepped = {build(name).config.model_type for name in STEPPED} | {
        "llama",
        "gpt2",
        "mpt",
        "gpt_neox",
        "olmo2",
        "mistral",
    }
    assert stepped | {"qwen2", "qwen3"} == set(FAMILIES)
