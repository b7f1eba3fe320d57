"""Multi-token prediction against its formula, written with torch's own operations."""

import pytest
import torch
import torch.nn.functional as F

from megalm.config.compose import compose_config
from megalm.data.batch import Batch
from megalm.model.transformer import Transformer
from megalm.objectives.next_token import NextToken
from megalm.parallel.initialize import initialize
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh

SMALL = [
    "+model=tiny", "model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "model.ffn_hidden_size=24",
    "model.vocab_size=37", "model.seq_length=12", "model.position=rope", "model.init_std=0.3", "model.prediction.loss=0.5",
]  # fmt: skip


def _build(*overrides):
    config = compose_config([*SMALL, *overrides])
    model = Transformer(config.model, LayerContext(Mesh.single(), config.parallel), objective=NextToken())
    initialize(model, 3)
    return config.model, model


def _batch(config, rows=2, documents=False):
    torch.manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, config.seq_length + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    if not documents:
        return batch
    ids = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 1 + [1] * 11], dtype=torch.int32)
    mask = torch.ones(ids.shape)
    mask[:, :-1] = (ids[:, :-1] == ids[:, 1:]).float()
    positions = torch.cat([torch.arange(n) for n in (5, 4, 3, 1, 11)]).view(2, 12)
    return Batch(batch.tokens, batch.labels, loss_mask=mask, positions=positions, document_ids=ids)


def _norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def _reference(config, model, batch):
    """The whole loss, position by position: (loss, [a depth's loss, ...], [its tokens, ...])."""
    weights = dict(model.named_parameters())
    where = model.positions(batch)
    hidden = model.run_layers(model.embed(batch), batch)
    output = weights["embedding.weight"] if config.tie_embeddings else weights["head.output.weight"]
    state = _norm(hidden, weights["head.final_norm.weight"])
    mask = torch.ones(batch.labels.shape) if batch.loss_mask is None else batch.loss_mask
    total = (F.cross_entropy(F.linear(state, output).permute(1, 2, 0), batch.labels, reduction="none") * mask).sum()
    rows, length = batch.labels.shape
    ids = batch.document_ids if batch.document_ids is not None else torch.zeros(rows, length)
    losses, counts = [], []
    for depth in range(config.prediction.depth):
        prefix = f"predictions.{depth}."
        # a token that is not there, or is another document's, may be any: what is behind it counts nothing
        ahead = torch.zeros(rows, length, dtype=torch.int64)
        ahead[:, : length - depth] = batch.labels[:, depth:]
        embedded = weights["embedding.weight"][ahead.t()]
        both = torch.cat(
            [
                _norm(embedded, weights[prefix + "embedding_norm.weight"]),
                _norm(state, weights[prefix + "hidden_norm.weight"]),
            ],
            -1,
        )
        merged = both @ weights[prefix + "merge.weight"].t()
        state = _norm(model.predictions[depth].layer(merged, where), weights[prefix + "final_norm.weight"])
        logits = F.linear(state, output)
        loss, count = torch.zeros(()), 0
        for row in range(rows):
            for here in range(length):
                there = here + depth + 1
                if there < length and ids[row, here] == ids[row, there] and mask[row, there]:
                    loss = loss + F.cross_entropy(logits[here, row], batch.labels[row, there])
                    count += 1
        losses.append(loss)
        counts.append(count)
    total = total + config.prediction.loss / config.prediction.depth * sum(losses)
    return total, losses, counts


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("documents", [False, True], ids=["stream", "documents"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_loss_and_every_gradient_are_those_of_the_formula(depth, documents, tied, recompute):
    config, model = _build(
        f"model.prediction.depth={depth}", f"model.tie_embeddings={tied}", f"parallel.recompute={recompute}"
    )
    batch = _batch(config, documents=documents)
    expected, losses, counts = _reference(config, model, batch)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, sums = model(None, batch.look_ahead(depth))
    total.backward()
    torch.testing.assert_close(sums["prediction_loss"], torch.stack(losses).detach(), rtol=1e-5, atol=1e-5)
    assert sums["prediction_tokens"].tolist() == counts
    for name, parameter in model.named_parameters():
        largest = wanted[name].abs().max()
        assert largest > 0, name
        assert (parameter.grad - wanted[name]).abs().max() <= 1e-5 * largest, name


def test_a_chunk_of_positions_at_a_time_gives_the_same():
    config, model = _build("model.prediction.depth=2", "parallel.loss_chunk=5")
    batch = _batch(config)
    expected, _, _ = _reference(config, model, batch)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(None, batch.look_ahead(2))[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name


def test_no_position_looks_beyond_its_document():
    config, _ = _build("model.prediction.depth=2")
    batch = _batch(config, documents=True).look_ahead(2)
    for row in range(2):
        for here in range(12):
            for depth in (1, 2):
                counts = batch.further_mask[row, here, depth - 1].item()
                there = here + depth
                within = there < 12 and batch.document_ids[row, here] == batch.document_ids[row, there]
                assert counts == (batch.loss_mask[row, there].item() if within else 0.0)
                if counts:
                    assert batch.further_labels[row, here, depth - 1] == batch.labels[row, there]


def test_what_lies_in_another_document_changes_no_loss():
    config, model = _build("model.prediction.depth=2", "model.moe.num_experts=0")
    one = _batch(config, documents=True)
    tokens = one.tokens.clone()
    tokens[0, 5:9] = (tokens[0, 5:9] + 7) % config.vocab_size  # the second document of the first row
    labels = torch.cat([tokens[:, 1:], one.labels[:, -1:]], 1)
    other = Batch(tokens, labels, one.loss_mask, one.positions, one.document_ids)
    found = []
    for batch in (one, other):
        rows = Batch(*(t[:1, :5] for t in (batch.tokens, batch.labels, batch.loss_mask, batch.positions)))
        apart = model(None, rows.look_ahead(2))[1]["prediction_loss"]
        found.append((model(None, batch.look_ahead(2))[1]["prediction_loss"], apart))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert not torch.equal(found[0][0], found[1][0])


def test_evaluation_has_no_use_for_it():
    config, model = _build("model.prediction.depth=1")
    model.eval()
    total, sums = model(None, _batch(config))
    assert "prediction_loss" not in sums and set(sums) == {"loss", "tokens"}
    torch.testing.assert_close(total, sums["loss"])


def test_a_batch_that_does_not_look_ahead_is_refused_in_training():
    config, model = _build("model.prediction.depth=1")
    with pytest.raises(ValueError, match="look_ahead"):
        model(None, _batch(config))
