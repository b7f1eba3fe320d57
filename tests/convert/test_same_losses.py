"""Training here is training in transformers: from the same weights and on the same tokens, the same losses."""

import pytest
import torch
import torch.nn.functional as F

from megalm.config import OptimConfig, ParallelConfig
from megalm.convert.formats import open_source
from megalm.data.batch import Batch
from megalm.generate.model import build_model, compute_logits
from megalm.objectives.next_token import NextToken
from megalm.optim.sharded import ShardedOptimizer
from megalm.parallel.mesh import Mesh
from tests.convert.architectures import build, tokens

STEPS, LR, CLIP = 20, 2e-3, 1.0
OPTIM = OptimConfig(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def batches():
    for step in range(STEPS):
        ids = tokens(4, 33, seed=100 + step) % 12  # few of the words, so that there is something to learn
        yield ids[:, :-1], ids[:, 1:]


def losses_of_transformers(peer) -> list[float]:
    """torch.optim.AdamW without decay on norms, biases and embeddings, clipped by global norm."""
    embeddings = {id(module.weight) for module in peer.modules() if isinstance(module, torch.nn.Embedding)}
    groups = {True: [], False: []}
    for (
        name,
        parameter,
    ) in peer.named_parameters():  # some norms have a row for each head, some biases one for each expert
        matrix = parameter.ndim > 1 and not name.endswith("bias") and "norm" not in name.split(".")[-2]
        groups[matrix and id(parameter) not in embeddings].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": OPTIM.weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=LR,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
    )
    peer.train()
    losses = []
    for inputs, labels in batches():
        loss = F.cross_entropy(peer(inputs).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_of_megalm(model) -> list[float]:
    optimizer = ShardedOptimizer([model], OPTIM, Mesh.single("cpu"), ParallelConfig())
    model.train()
    model.objective = NextToken()
    losses = []
    for inputs, labels in batches():
        optimizer.begin_step(1)
        objective, report = model(None, Batch(tokens=inputs, labels=labels))
        (objective / labels.numel()).backward()
        optimizer.finish_gradients()
        norm = float(optimizer.statistics()[0])
        optimizer.step(LR, grad_scale=min(1.0, CLIP / (norm + 1e-6)))
        losses.append(float(report["loss"] / report["tokens"]))
    return losses


@pytest.mark.parametrize("name", ["llama3", "llama-tied-biased", "gpt2", "mpt", "pythia", "olmo2"])
def test_same_logits_then_the_same_twenty_losses(name, tmp_path):
    peer = build(name)
    for module in peer.modules():  # GPT-2's default config drops elements
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    peer.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    model = build_model(source.model, source.weights)
    with torch.no_grad():
        torch.testing.assert_close(compute_logits(model, tokens()), peer(tokens()).logits, rtol=0, atol=1e-4)
    expected, ours = losses_of_transformers(peer), losses_of_megalm(model)
    assert expected[-1] < expected[0] - 0.3  # it learns: 20 steps that change nothing would prove nothing
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-4  # seen: 1e-6
