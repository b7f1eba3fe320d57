"""What Muon's update costs beside AdamW's, and what that is of a whole step: by turns, in processor time."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from megalm.config import ModelConfig, OptimConfig, ParallelConfig
from megalm.data.batch import Batch
from megalm.model.transformer import Transformer
from megalm.objectives.next_token import NextToken
from megalm.optim.sharded import ShardedOptimizer
from megalm.parallel.initialize import initialize
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh

HELP = "cost of Muon's update beside AdamW's, and of a whole step at several batch sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shape; the usual one has 50 million parameters."""
    parser.add_argument("--layers", type=int, default=8, metavar="N")
    parser.add_argument("--hidden", type=int, default=512, metavar="N")
    parser.add_argument("--vocabulary", type=int, default=50304, metavar="N")
    parser.add_argument("--seq-length", type=int, default=512, metavar="N")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192, 32768, 131072], metavar="N", help="tokens a step"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    result = measure(args)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{result['parameters']:,} parameters, {args.threads} thread(s), medians of {args.rounds} rounds by turns")
    print(f"update: AdamW {result['adamw_ms']:.0f} ms, Muon {result['muon_ms']:.0f} ms of processor time")
    print(f"forward and backward: {result['pass_ms_per_1000_tokens']:.0f} ms for 1,000 tokens")
    print("tokens a step    whole step, Muon / AdamW")
    for tokens, ratio in result["ratios"].items():
        print(f"{tokens:>13}    {ratio:.3f}")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Updates of both rules by turns on one gradient, and one forward and backward pass."""
    torch.set_num_threads(args.threads)
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=max(1, args.hidden // 64),
        vocab_size=args.vocabulary,
        seq_length=args.seq_length,
        tie_embeddings=True,
    )
    model.fill_in()
    sides = {name: _Side(model, name) for name in ("adamw", "muon")}
    passes: list[float] = []
    updates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, side in sides.items():
            passed, updated = side.step()
            if number:  # the first touches memory
                passes.append(passed)
                updates[name].append(updated)
    per_token = statistics.median(passes) / args.seq_length
    adamw, muon = (statistics.median(updates[name]) for name in ("adamw", "muon"))
    return {
        "parameters": sum(p.numel() for p in sides["adamw"].model.parameters()),
        "adamw_ms": 1e3 * adamw,
        "muon_ms": 1e3 * muon,
        "pass_ms_per_1000_tokens": 1e6 * per_token,
        "ratios": {str(n): (n * per_token + muon) / (n * per_token + adamw) for n in args.tokens},
    }


class _Side:
    """One model with one rule."""

    def __init__(self, model: ModelConfig, name: str) -> None:
        mesh, parallel = Mesh.single(), ParallelConfig()
        self.model = Transformer(model, LayerContext(mesh, parallel), objective=NextToken())
        initialize(self.model, 0)
        self.optimizer = ShardedOptimizer([self.model], OptimConfig(name=name), mesh, parallel)
        tokens = torch.randint(
            0, model.vocab_size, (1, model.seq_length + 1), generator=torch.Generator().manual_seed(0)
        )
        self.batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def step(self) -> tuple[float, float]:
        """Processor seconds of forward and backward, and of the update."""
        begun = time.process_time()
        self.optimizer.begin_step(1)
        objective, _ = self.model(None, self.batch)
        (objective / self.batch.tokens.numel()).backward()
        self.optimizer.finish_gradients()
        self.optimizer.statistics()
        passed = time.process_time()
        self.optimizer.step(1e-4, 1.0)
        return passed - begun, time.process_time() - passed
