"""The sharded optimizer against torch's AdamW on one process: weights, norms and state, for every ZeRO stage and
mixture of shardings."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megalm.config import OptimConfig, ParallelConfig
from megalm.optim import build_optimizer
from megalm.optim.clip import clip_factor
from megalm.optim.sharded import ShardedOptimizer
from megalm.parallel import deferred
from megalm.parallel.collectives import count_bytes, gather, reduce, split
from megalm.parallel.embedding import VocabularyParallelEmbedding
from megalm.parallel.initialize import initialize
from megalm.parallel.linear import ColumnParallelLinear, Output, RowParallelLinear, column_parallel
from megalm.parallel.loss import vocabulary_parallel_cross_entropy
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.parallel.norm import Norm
from megalm.parallel.slices import tie
from tests.distributed import run_ranks

VOCABULARY, H, S = 13, 8, 8
OPTIM = OptimConfig(weight_decay=0.3, betas=(0.9, 0.95), eps=1e-8)
LR = 0.02


class Stage(nn.Module):
    """A small network with every kind of parameter: split, replicated, partly replicated, tied."""

    def __init__(self, mesh, sequence, first=True, last=True, dtype=torch.float32):
        super().__init__()
        t, common = mesh.tensor, dict(sequence_parallel=sequence, init_std=0.3, dtype=dtype)
        self.mesh, self.sequence, self.first, self.last = mesh, sequence, first, last
        norm = dict(eps=1e-5, axis=t, sequence_parallel=sequence, dtype=dtype)
        self.embedding = VocabularyParallelEmbedding(VOCABULARY, H, t, name="embedding", **common)
        if first:
            self.norm = Norm("layernorm", H, name="norm", bias=True, **norm)
            outputs = [Output("q", 12, 3), Output("k", 6, 3, True)]
            self.up = ColumnParallelLinear(H, outputs, t, bias=True, **common)
            self.down = RowParallelLinear(12, H, t, name="down", unit=3, bias=True, **common)
        if last:
            self.final = Norm("rmsnorm", H, name="final", **norm)

    def forward(self, x, tokens):
        if self.first:
            x = self.embedding(tokens)
            q, k = self.up(self.norm(x)).split(self.up.split_sizes, -1)
            repeat = q.shape[-1] // k.shape[-1]
            k = k.unflatten(-1, (-1, 3)).repeat_interleave(repeat, -2).flatten(-2)
            x = x + self.down(torch.tanh(q) * k)
        if self.last:
            tensor = self.mesh.tensor
            return column_parallel(self.final(x), self.embedding.weight, None, tensor, self.sequence)
        return x


def micro_batches(count):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCABULARY, (2, S, 2), generator=generator) for _ in range(count)]


STEPS, PER_STEP = 3, 4


def parameter_names(model):
    return {name: p for name, p in model.named_parameters()}


def torch_adamw(groups):
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)


def plain(torch_optimizer=torch_adamw, states=(("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq"))):
    """Torch's own optimizer and clipping on one process: norms, global tensors of weights and states.

    states: ours and torch's name of each.
    """
    model = Stage(Mesh.single(), False)
    initialize(model, 1)
    decayed = [model.up.weight, model.down.weight]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch_optimizer(groups)
    norms, data = [], iter(micro_batches(STEPS * PER_STEP))
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(PER_STEP):
            tokens, labels = next(data)
            logits = model(None, tokens)
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    found = {}
    for ours, theirs in states:
        found[f"optimizer.{ours}.k.weight"] = optimizer.state[model.up.weight][theirs][12:]
        found[f"optimizer.{ours}.embedding.weight"] = optimizer.state[model.embedding.weight][theirs]
    return norms, {
        **found,
        "embedding.weight": model.embedding.weight,
        "norm.weight": model.norm.weight,
        "norm.bias": model.norm.bias,
        "q.weight": model.up.weight[:12],
        "k.weight": model.up.weight[12:],
        "q.bias": model.up.bias[:12],
        "k.bias": model.up.bias[12:],
        "down.weight": model.down.weight,
        "down.bias": model.down.bias,
        "final.weight": model.final.weight,
    }


def train(layout, sequence=False, uneven=False, split_backward=False, bucket_mb=0.0003, steps=STEPS, optim=OPTIM):
    """The same training on this layout; returns (norms, boxes, own parameters are the masters', memory, bytes)."""
    parallel = ParallelConfig(bucket_mb=bucket_mb, **layout)
    mesh = build_mesh(parallel)
    pipeline = mesh.pipeline
    model = Stage(mesh, sequence, pipeline.rank == 0, pipeline.rank == pipeline.size - 1)
    if pipeline.size > 1:
        tie(model.embedding.weight, mesh.pipeline_ends)
    initialize(model, 1)
    optimizer = build_optimizer([model], optim, mesh, parallel)
    norms, data = [], micro_batches(steps * PER_STEP)
    with count_bytes() as sent:
        for step in range(steps):
            mine = data[step * PER_STEP : (step + 1) * PER_STEP]
            replicas = mesh.data.size
            mine = (mine[:1] if mesh.data.rank == 0 else mine[1:]) if uneven else mine[mesh.data.rank :: replicas]
            optimizer.begin_step(len(mine), even=not uneven)
            queues = []
            for tokens, labels in mine:
                queue = deferred.Queue()
                queues.append(queue)
                context = deferred.defer_weight_gradients(queue) if split_backward else torch.enable_grad()
                run_micro_batch(model, mesh, tokens, labels, context)
                if len(queues) > 1:
                    queues.pop(0).run()
            for queue in queues:
                queue.run()
            optimizer.finish_gradients()
            norm, nonfinite, extra = optimizer.statistics(torch.tensor([1.0, mesh.rank]))
            assert nonfinite == 0 and extra.tolist() == [mesh.world_size, sum(range(mesh.world_size))]
            norms.append(float(norm))
            optimizer.step(LR, clip_factor(norm, 1.0))
    optimizer.wait_weights()
    boxes = [(box.name, box.global_shape, box.offset, box.tensor.clone()) for box in optimizer.boxes()]
    if parallel.data_mode == "fully_shard":
        return norms, boxes
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    masters = sum(bucket.master.numel() for bucket in optimizer.buckets)
    gradients = sum(bucket.gradient.numel() for bucket in optimizer.buckets if bucket.gradient is not None)
    assert all(p.grad is None for p in model.parameters())
    return norms, boxes, parameters, (masters, gradients, len(optimizer.buckets)), sent.bytes


def run_micro_batch(model, mesh, tokens, labels, context):
    """Forward and backward; two pipeline stages hand the hidden state over by all-reduces (this is no test of
    pipelines)."""
    pipeline, axis = mesh.pipeline, mesh.context
    if axis.size > 1:  # this network mixes nothing along the sequence, so that any cut is a context cut
        tokens, labels = split(tokens, axis), split(labels, axis)

    def loss_of(logits):
        return vocabulary_parallel_cross_entropy(logits, labels, mesh.tensor, vocab_size=VOCABULARY).sum()

    if pipeline.size == 1:
        loss = loss_of(model(None, tokens))
        with context:
            loss.backward()
        return
    if pipeline.rank == 0:
        hidden = model(None, tokens)
        reduce(hidden.detach(), pipeline)
        grad = reduce(torch.zeros_like(hidden), pipeline)
        with context:
            hidden.backward(grad)
        return
    length = tokens.shape[0] // (mesh.tensor.size if model.sequence else 1)
    hidden = reduce(torch.zeros(length, tokens.shape[1], H), pipeline).requires_grad_()
    loss = loss_of(model(hidden, None))
    with context:
        loss.backward()
    reduce(hidden.grad, pipeline)


def assemble(per_rank):
    """Global tensors out of all ranks' boxes; every rank's copy of an element must be equal (to rounding)."""
    tensors, seen = {}, {}
    for _, boxes, *_ in per_rank:
        for name, shape, offset, values in boxes:
            window = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            whole = tensors.setdefault(name, torch.zeros(shape))
            filled = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            both = filled[window]
            torch.testing.assert_close(whole[window][both], values[both], rtol=1e-6, atol=1e-7)
            whole[window] = values
            filled[window] = True
    assert all(filled.all() for filled in seen.values()), "an element is on no rank"
    return tensors


def check(per_rank, expected=None):
    norms, expected = expected or plain()
    for found, *_ in per_rank:
        assert found == pytest.approx(norms, rel=1e-5)
    tensors = assemble(per_rank)
    for name, value in expected.items():
        torch.testing.assert_close(
            tensors[name], value.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


LAYOUTS = [
    (1, {}, {}),
    (2, dict(data=2), {}),
    (2, dict(data=2, zero_stage=1), {}),
    (2, dict(data=2, zero_stage=2), {}),
    (2, dict(context=2, zero_stage=1), {}),
    (2, dict(tensor=2), {}),
    (2, dict(tensor=2), dict(sequence=True)),
    (4, dict(tensor=4), {}),  # key heads on two ranks each
    (4, dict(tensor=4), dict(sequence=True)),
    (4, dict(tensor=2, data=2, zero_stage=1), dict(sequence=True)),
    (4, dict(tensor=2, context=2, zero_stage=2), dict(sequence=True)),
    (2, dict(pipeline=2), {}),  # tied embeddings on two ranks
    (4, dict(pipeline=2, data=2, zero_stage=2), {}),
    (4, dict(pipeline=2, tensor=2), dict(sequence=True)),
    (2, dict(data=2), dict(uneven=True)),
    (2, dict(data=2, zero_stage=1), dict(uneven=True)),
    (2, dict(data=2, zero_stage=2), dict(uneven=True)),
    (2, dict(data=2, zero_stage=1), dict(split_backward=True)),
    (2, dict(data=2, zero_stage=2), dict(split_backward=True)),
    (2, dict(data=2, zero_stage=1), dict(bucket_mb=25.0)),
    (2, dict(data=2, data_mode="fully_shard"), {}),
    (4, dict(data=4, data_mode="fully_shard"), {}),
    (4, dict(tensor=2, data=2, data_mode="fully_shard"), dict(sequence=True)),
    (4, dict(pipeline=2, context=2, data_mode="fully_shard"), {}),
]


@pytest.mark.parametrize(("world", "layout", "options"), LAYOUTS, ids=str)
def test_training_equals_plain_adamw(world, layout, options):
    check(run_ranks(world, train_with, layout, options))


def train_with(layout, options):
    return train(layout, **options)


def test_zero_splits_memory_and_traffic():
    plain_run, first, second = (run_ranks(2, train_with, dict(data=2, zero_stage=stage), {})[1] for stage in (0, 1, 2))
    (masters, gradients, buckets), (masters1, gradients1, _), (masters2, gradients2, _) = (
        plain_run[3],
        first[3],
        second[3],
    )
    assert buckets > 3
    assert masters1 == masters2 == masters // 2
    assert gradients1 == gradients and gradients2 < gradients / 2  # only the tied embedding's buffer stays
    steps, total = STEPS, gradients * 4
    reduced = plain_run[4]["all_reduce", "data_context"]
    assert reduced == steps * total  # 2 (n-1)/n of the buffer for n = 2
    assert first[4]["reduce_scatter", "data_context"] == first[4]["all_gather", "data_context"] == steps * total / 2


def test_parameters_are_those_of_the_masters_on_every_rank():
    for stage in (1, 2):
        first, second = run_ranks(2, train_with, dict(data=2, zero_stage=stage), {})
        assert torch.equal(first[2], second[2])
        values = torch.cat([v.flatten() for n, _, _, v in first[1] + second[1] if not n.startswith("optimizer.")])
        assert torch.equal(values.sort().values, first[2].sort().values)


# -------------------------------------------------------------------------------------------------------------- bf16
def narrow(stage):
    parallel = ParallelConfig(bucket_mb=0.0003, zero_stage=stage)
    mesh = build_mesh(parallel)
    model = Stage(mesh, False, dtype=torch.bfloat16)
    initialize(model, 1)
    optimizer = ShardedOptimizer([model], OPTIM, mesh, parallel)
    for tokens, labels in micro_batches(4)[mesh.data.rank :: mesh.data.size]:
        optimizer.begin_step(1)
        logits = model(None, tokens)
        vocabulary_parallel_cross_entropy(logits, labels, mesh.tensor, vocab_size=VOCABULARY).sum().backward()
        optimizer.finish_gradients()
        # So small an update that bf16 weights alone would never move.
        optimizer.step(1e-5, 1.0)
    optimizer.wait_weights()
    boxes = [(b.name, b.global_shape, b.offset, b.tensor.clone()) for b in optimizer.boxes()]
    return boxes, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_parameters_have_fp32_masters(stage):
    per_rank = run_ranks(2, narrow, stage)
    fresh = Stage(Mesh.single(), False, dtype=torch.bfloat16)
    initialize(fresh, 1)
    masters = assemble([(None, boxes) for boxes, _ in per_rank])
    assert all(value.dtype == torch.float32 for value in masters.values())
    moved = (masters["q.weight"] - fresh.up.weight[:12].float()).abs()
    assert (moved > 1e-6).float().mean() > 0.9 and (moved < 1e-4).all()
    for (name, parameter), ours in zip(fresh.named_parameters(), per_rank[1][1], strict=True):
        assert torch.equal(ours, per_rank[0][1][list(dict(fresh.named_parameters())).index(name)])
        if name == "down.weight":
            assert torch.equal(ours, masters["down.weight"].to(torch.bfloat16))
        assert ours.shape == parameter.shape


# --------------------------------------------------------------------------------------------------- refusal and state
def refuse_then_go_on():
    mesh = build_mesh(ParallelConfig())
    model = Stage(mesh, False)
    initialize(model, 1)
    optimizer = ShardedOptimizer([model], OPTIM, mesh, ParallelConfig(zero_stage=1))
    before = [p.detach().clone() for p in model.parameters()]

    def gradients(poison):
        optimizer.begin_step(1)
        tokens, labels = micro_batches(1)[0]
        loss = vocabulary_parallel_cross_entropy(model(None, tokens), labels, mesh.tensor, vocab_size=VOCABULARY).sum()
        (loss * (float("nan") if poison and mesh.rank == 1 else 1.0)).backward()
        optimizer.finish_gradients()
        return optimizer.statistics()

    norm, bad = gradients(poison=True)
    untouched = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    clean_norm, clean = gradients(poison=False)
    return float(norm), int(bad), untouched, float(clean_norm), int(clean), optimizer.state()


def test_a_poisoned_step_is_seen_everywhere_and_leaves_nothing_behind():
    results = run_ranks(2, refuse_then_go_on)
    elements = sum(p.numel() for p in Stage(Mesh.single(), False).parameters())
    for norm, bad, untouched, clean_norm, clean, state in results:
        assert norm != norm and bad == elements and untouched
        assert clean_norm > 0 and clean == 0 and state["step"] == 0


def save_and_load(stage):
    parallel = ParallelConfig(zero_stage=stage, bucket_mb=0.0003)
    mesh = build_mesh(parallel)

    def fresh(seed):
        model = Stage(mesh, False)
        initialize(model, seed)
        return model, ShardedOptimizer([model], OPTIM, mesh, parallel)

    def steps(model, optimizer, data):
        for tokens, labels in data:
            optimizer.begin_step(1)
            logits = model(None, tokens)
            vocabulary_parallel_cross_entropy(logits, labels, mesh.tensor, vocab_size=VOCABULARY).sum().backward()
            optimizer.finish_gradients()
            optimizer.step(LR, 0.5)
        optimizer.wait_weights()

    data = micro_batches(4)
    model, optimizer = fresh(1)
    steps(model, optimizer, data[:2])
    copies = [(box.name, box.offset, box.tensor.clone()) for box in optimizer.boxes()]
    other, restored = fresh(2)
    for box, (name, offset, values) in zip(restored.boxes(), copies, strict=True):
        assert (box.name, box.offset) == (name, offset)
        box.tensor.copy_(values)
    restored.gather_parameters()
    restored.load_state(optimizer.state())
    steps(model, optimizer, data[2:])
    steps(other, restored, data[2:])
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_state_through_boxes_continues_to_the_bit(stage):
    assert all(run_ranks(2, save_and_load, stage))


def test_gradients_outside_a_step_go_to_grad_as_usual():
    mesh = Mesh.single()
    model = Stage(mesh, False)
    initialize(model, 1)
    ShardedOptimizer([model], OPTIM, mesh, ParallelConfig())
    model(None, micro_batches(1)[0][0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert gather(model.final.weight, mesh.tensor) is model.final.weight
