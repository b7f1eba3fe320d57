"""What the explicit parallel layers and the sharded optimizer cost on a single rank, against the same model in plain PyTorch."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalm import ops
from megalm.config import ModelConfig, OptimConfig, ParallelConfig
from megalm.data.batch import Batch
from megalm.model.head import Head
from megalm.model.transformer import Transformer
from megalm.objectives.next_token import NextToken
from megalm.objectives.objective import Objective, Outcome
from megalm.optim.clip import clip_factor
from megalm.optim.sharded import ShardedOptimizer
from megalm.parallel.embedding import VocabularyParallelEmbedding
from megalm.parallel.initialize import initialize
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalm.parallel.mesh import Mesh

HELP = "cost of the parallel layers and the sharded optimizer on one rank, against nn.Linear and torch's AdamW"


class _PlainLinear(nn.Linear):
    split_sizes: list[int]


class _PlainEmbedding(nn.Embedding):
    pass


def _plain(module: nn.Module) -> nn.Module:
    """Replace the parallel layers inside a model by torch's own, with the same weights."""
    for name, child in list(module.named_children()):
        if isinstance(child, ColumnParallelLinear | RowParallelLinear):
            rows, columns = child.weight.shape
            plain = _PlainLinear(columns, rows, bias=child.bias is not None)
            plain.load_state_dict(child.state_dict())
            plain.split_sizes = getattr(child, "split_sizes", [rows])
            setattr(module, name, plain)
        elif isinstance(child, VocabularyParallelEmbedding):
            setattr(module, name, _PlainEmbedding.from_pretrained(child.weight.detach().clone(), freeze=False))
        else:
            _plain(child)
    return module


class _PlainLoss(Objective):
    """torch's cross-entropy."""

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        logits = head.output(head.final_norm(hidden))
        total = F.cross_entropy(logits.flatten(0, 1), batch.labels.t().flatten(), reduction="sum")
        return Outcome(total, {"loss": total.detach()})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--micro-batches", type=int, default=2, help="of one sequence each, in every step")
    parser.add_argument("--rounds", type=int, default=7, help="alternating measurements of each side")
    parser.add_argument("--ops", default="auto", help="ops.backend of both sides: auto, native or reference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    result = measure(args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"plain PyTorch   {result['plain_ms']:8.1f} ms of CPU time a step")
        print(f"megalm, 1 rank  {result['parallel_ms']:8.1f} ms of CPU time a step")
        print(f"overhead        {100 * result['overhead']:+8.2f} % (median of {args.rounds} ratios, alternating)")
        print(f"largest difference of weights after training: {result['difference']:.1e}")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """CPU time of both sides in turns; the ratio of neighbours cancels what else the machine does."""
    torch.set_num_threads(args.threads)
    ops.set_backend(args.ops)
    heads = max(1, args.hidden // 64)
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=heads,
        vocab_size=args.vocabulary,
        seq_length=args.seq_length,
    )
    model.fill_in()
    mesh, parallel = Mesh.single(), ParallelConfig()
    optim = OptimConfig(betas=(0.9, 0.95), weight_decay=0.1)
    ours = Transformer(model, LayerContext(mesh, parallel), objective=NextToken())
    plain = Transformer(model, LayerContext(mesh, parallel), objective=_PlainLoss())
    initialize(ours, 0)
    initialize(plain, 0)
    _plain(plain)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, args.vocabulary, (args.micro_batches, 1, args.seq_length + 1), generator=generator)
    batches = [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    steps: list[Callable[[], None]] = [
        _plain_step(plain, optim, batches),
        _parallel_step(ours, optim, mesh, parallel, batches),
    ]
    times: list[list[float]] = [[], []]
    for number in range(args.rounds + 2):
        for side, step in enumerate(steps):
            start = time.process_time()
            step()
            if number >= 2:
                times[side].append(time.process_time() - start)
    ratios = [ours_s / plain_s for plain_s, ours_s in zip(*times, strict=True)]
    difference = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    return {
        "plain_ms": 1e3 * statistics.median(times[0]),
        "parallel_ms": 1e3 * statistics.median(times[1]),
        "overhead": statistics.median(ratios) - 1.0,
        "difference": difference,
    }


def _parallel_step(
    model: Transformer, optim: OptimConfig, mesh: Mesh, parallel: ParallelConfig, batches: list[Batch]
) -> Callable[[], None]:
    optimizer = ShardedOptimizer([model], optim, mesh, parallel)
    scale = 1.0 / sum(batch.tokens.numel() for batch in batches)

    def step() -> None:
        optimizer.begin_step(len(batches))
        for batch in batches:
            objective, _ = model(None, batch)
            (objective * scale).backward()
        optimizer.finish_gradients()
        norm = optimizer.statistics()[0]
        optimizer.step(1e-4, clip_factor(norm, 1.0))

    return step


def _plain_step(model: nn.Module, optim: OptimConfig, batches: list[Batch]) -> Callable[[], None]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embedding" in n]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=optim.betas, eps=optim.eps, fused=True)
    scale = 1.0 / sum(batch.tokens.numel() for batch in batches)

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            objective, _ = model(None, batch)
            (objective * scale).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step
