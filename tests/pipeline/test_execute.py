"""The executor against one process, for every schedule: outputs, gradients, hook calls, memory."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.errors import ConfigError
from megalm.parallel import deferred
from megalm.parallel.collectives import count_bytes
from megalm.parallel.mesh import Axis
from megalm.pipeline.actions import Placement
from megalm.pipeline.execute import Executor
from megalm.pipeline.schedule import KINDS, build_schedule
from tests.distributed import run_ranks

SEQUENCE, BATCH, HIDDEN = 5, 2, 6


class DeferringLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        flat = gradient.flatten(0, 1)
        product = deferred.compute_or_defer(ctx.weight, lambda: flat.T @ x.flatten(0, 1))
        return gradient @ ctx.weight, product


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5)
        self.bias = nn.Parameter(torch.randn(HIDDEN, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(DeferringLinear.apply(x, self.weight) + self.bias)
        # the same weight a second time: one hook call must remain one
        return x + DeferringLinear.apply(y, self.weight)


class Chunk(nn.Module):
    """Layers [start, end); the first chunk looks tokens up, the last sums a loss."""

    def __init__(self, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Layer(i) for i in layers})
        self.first, self.last = first, last
        if first:
            self.embedding = nn.Parameter(torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(100)))

    def forward(self, x: Tensor | None, batch: Tensor):
        if self.first:
            assert x is None
            x = self.embedding[batch.T]
        assert x is not None and x.shape == (SEQUENCE, batch.shape[0], HIDDEN)
        for layer in self.layers.values():
            x = layer(x)
        layers = {"layers": torch.tensor(float(len(self.layers)))}
        if not self.last:
            return x, layers
        objective = (x**2).sum() * (1 + batch[0, 0])
        return objective, {**layers, "loss": objective, "first": torch.tensor(float(batch[0, 0]))}


def data(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 11, (BATCH, SEQUENCE), generator=generator) for _ in range(count)]


def chunks_of(where: Placement, rank: int, num_layers: int) -> list[Chunk]:
    """Uneven on purpose: the first stages get one layer more."""
    sizes = [num_layers // where.stages + (s < num_layers % where.stages) for s in range(where.stages)]
    starts = [sum(sizes[:s]) for s in range(where.stages)]
    return [Chunk(range(starts[s], starts[s] + sizes[s]), s == 0, s == where.stages - 1) for s in where.of_rank(rank)]


def execute(kind: str, ranks: int, count: int, chunks: int | None, num_layers: int, axis: Axis) -> dict:
    schedule = build_schedule(kind, ranks, count, chunks)
    modules = chunks_of(schedule.placement, axis.rank, num_layers)
    calls: dict[str, int] = {}
    parameters = {name: p for module in modules for name, p in module.named_parameters()}
    buffers = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def count_calls(name):
        def hook(parameter):
            if parameter.grad is None:
                return
            calls[name] = calls.get(name, 0) + 1
            buffers[name] += parameter.grad
            parameter.grad = None

        return hook

    for name, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(count_calls(name))
    executor = Executor(modules, schedule, axis, micro_batch_size=BATCH, seq_length=SEQUENCE, hidden_size=HIDDEN)
    reports = executor.run(data(count), 0.5)
    assert set(calls.values()) == {count}
    evaluated = executor.evaluate(data(3))
    return {
        "reports": reports,
        "evaluated": evaluated,
        "gradients": buffers,
        "last": executor.has_last,
        "first": executor.has_first,
    }


def on_ranks(*arguments) -> dict:
    size = dist.get_world_size()
    axis = Axis("pipeline", size, dist.get_rank(), tuple(range(size)), dist.group.WORLD)
    return execute(*arguments, axis)


def plain(count: int, num_layers: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    chunk = Chunk(range(num_layers), True, True)
    reports = []
    for batch in data(count):
        objective, sums = chunk(None, batch)
        (objective * 0.5).backward()
        reports.append({name: value.detach() for name, value in sums.items()})
    return reports, {name: p.grad for name, p in chunk.named_parameters()}


def added(of_ranks: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """What all ranks reported of each micro-batch: every stage has a part in it."""
    return [
        {name: sum(report[name] for report in reports if name in report) for name in ("layers", "loss", "first")}
        for reports in zip(*of_ranks, strict=True)
    ]


def check(results: list[dict], count: int, num_layers: int) -> None:
    reports, gradients = plain(count, num_layers)
    seen = {}
    for rank, result in enumerate(results):
        assert all(("loss" in report) == result["last"] for report in result["reports"] + result["evaluated"])
        assert result["first"] == (rank == 0)
        seen.update(result["gradients"])
    assert sum(result["last"] for result in results) == 1
    torch.testing.assert_close(added([result["reports"] for result in results]), reports)
    torch.testing.assert_close(added([result["evaluated"] for result in results]), plain(3, num_layers)[0])
    assert seen.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_single_rank_equals_a_plain_loop(kind):
    check([execute(kind, 1, 3, None, 5, Axis("pipeline"))], 3, 5)


@pytest.mark.parametrize(
    ("kind", "ranks", "count", "chunks"),
    [(kind, 2, 4, None) for kind in KINDS]
    + [(kind, 3, 5, None) for kind in KINDS]
    + [
        ("gpipe", 2, 3, 2),
        ("interleaved", 2, 5, 3),
        ("1f1b", 4, 2, None),
        ("zb-v", 4, 9, None),
        ("dualpipe-v", 4, 8, None),
    ],
)
def test_ranks_equal_one_process(kind, ranks, count, chunks):
    check(run_ranks(ranks, on_ranks, kind, ranks, count, chunks, 9), count, 9)


def outputs_alive() -> tuple[int, int]:
    """(most outputs alive at once on the first of two GPipe ranks, forward passes)"""
    alive: list[weakref.ref] = []
    most = 0

    class Watched(Chunk):
        def forward(self, x, batch):
            nonlocal most
            output = super().forward(x, batch)
            alive.append(weakref.ref(output[0].untyped_storage()))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            return output

    rank = dist.get_rank()
    axis = Axis("pipeline", 2, rank, (0, 1), dist.group.WORLD)
    module = Watched(range(2), True, False) if rank == 0 else Chunk(range(2, 4), False, True)
    schedule = build_schedule("gpipe", 2, 8)
    executor = Executor([module], schedule, axis, micro_batch_size=BATCH, seq_length=SEQUENCE, hidden_size=HIDDEN)
    if rank == 1:
        executor.run(data(8))
        return 0, 8
    # the sender waits for each transfer, so that how many are still on their way is not left to chance
    from megalm.pipeline import execute

    started = execute.dist.batch_isend_irecv

    def finished(operations):
        works = started(operations)
        for work, operation in zip(works, operations, strict=True):
            if operation.op is dist.isend:
                work.wait()
        return works

    execute.dist.batch_isend_irecv = finished
    try:
        executor.run(data(8))
    finally:
        execute.dist.batch_isend_irecv = started
    return most, len(alive)


def test_outputs_are_freed_once_sent():
    most, count = run_ranks(2, outputs_alive)[0]
    assert count == 8
    assert most <= 2, f"{most} of {count} outputs were alive at once"


def bytes_sent() -> float:
    rank = dist.get_rank()
    axis = Axis("pipeline", 3, rank, (0, 1, 2), dist.group.WORLD)
    schedule = build_schedule("zb-v", 3, 5)
    modules = chunks_of(schedule.placement, rank, 6)
    executor = Executor(modules, schedule, axis, micro_batch_size=BATCH, seq_length=SEQUENCE, hidden_size=HIDDEN)
    with count_bytes() as counter:
        executor.run(data(5))
    assert set(counter.bytes) <= {("send", "pipeline")}
    return counter.total


def test_bytes_sent_are_the_formulas():
    """Each boundary between ranks: one activation forward and one gradient backward for each micro-batch."""
    one = SEQUENCE * BATCH * HIDDEN * 4
    # stages 0 5 | 1 4 | 2 3: rank 0 sends 0->1 and the gradient 5->4; rank 1 to both sides; the turn 2->3 is free
    assert run_ranks(3, bytes_sent) == [5 * one * 2, 5 * one * 4, 5 * one * 2]


def test_another_number_of_micro_batches_rebuilds_the_schedule():
    executor = Executor(
        [Chunk(range(3), True, True)],
        build_schedule("1f1b", 1, 4),
        Axis("pipeline"),
        micro_batch_size=BATCH,
        seq_length=SEQUENCE,
        hidden_size=HIDDEN,
    )
    reports = executor.run(data(2), 0.5)
    torch.testing.assert_close(reports, plain(2, 3)[0])


def test_a_schedule_for_another_pipeline_is_refused():
    with pytest.raises(ConfigError, match="2 ranks with 1 chunk"):
        Executor(
            [Chunk(range(3), True, True)],
            build_schedule("1f1b", 2, 4),
            Axis("pipeline"),
            micro_batch_size=BATCH,
            seq_length=SEQUENCE,
            hidden_size=HIDDEN,
        )
