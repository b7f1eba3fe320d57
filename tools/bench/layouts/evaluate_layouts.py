"""Does the layout change what a model is said to know? The smoke suite on every layout and batch, against one process."""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._workers import run_world
from .layouts import describe_environment

HELP = (
    "ask a suite on every layout of {1,2}^4 and at several batch sizes: decisions that differ, log-likelihoods that do"
)

TOLERANCE = 1e-4
"""Nats of a continuation's log-likelihood."""
AXES = ("data", "tensor", "pipeline", "context")
MODELS = {
    "llama": [],
    "gpt2": ["model.norm=layernorm", "model.norm_bias=true", "model.activation=gelu", "model.linear_bias=true",
             "model.position=learned"],
    "mixtral": ["model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=48"],
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (%(default)s)")
    parser.add_argument(
        "--batch-tokens", type=int, nargs="+", default=[1, 8192], help="of one forward pass (%(default)s)"
    )
    parser.add_argument("--largest-world", type=int, default=16, metavar="N", help="leave out layouts of more ranks")
    parser.add_argument("--limit", type=int, default=0, help="only the first items of each task; 0: all")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    """Exit status: 1 where a decision differs, or a log-likelihood by more than the tolerance."""
    begun = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as name:
        folder = Path(name)
        words = prepare(folder)
        for model in args.models.split(","):
            alone: list[Any] = []
            for sizes, batch in itertools.product(itertools.product((1, 2), repeat=4), args.batch_tokens):
                world = sizes[0] * sizes[1] * sizes[2] * sizes[3]
                if world > args.largest_world:
                    continue
                layout = [f"parallel.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True)]
                ask = [
                    *words,
                    *MODELS[model],
                    *layout,
                    f"evaluate.batch_tokens={batch}",
                    f"evaluate.limit={args.limit}",
                ]
                found: list[Any] = []
                run_world(world, score, ask, str(folder), receive=found.append)
                alone = alone or found[0][0]
                row = {
                    "model": model,
                    "world_size": world,
                    **dict(zip(AXES, sizes, strict=True)),
                    "batch_tokens": batch,
                }
                row |= compare(alone, found[0])
                rows.append(row)
                if not args.json:
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    result = {
        "benchmark": "evaluate_layouts",
        "environment": describe_environment(),
        "seconds": round(time.perf_counter() - begun, 1),
        "rows": rows,
        "runs": len(rows),
        "decisions_that_differ": sum(row["decisions_that_differ"] for row in rows),
        "largest_difference": max(row["largest_difference"] for row in rows),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{len(rows)} runs in {result['seconds']:.0f} s: {result['decisions_that_differ']} decisions differ, "
              f"log-likelihoods by at most {result['largest_difference']:.1e} nats")  # fmt: skip
    return 1 if result["decisions_that_differ"] or result["largest_difference"] > TOLERANCE else 0


def prepare(folder: Path) -> list[str]:
    """Write a tokenizer of bytes and some tokens; returns what all runs are told."""
    from megalm.posttrain.example import write_byte_tokenizer

    from .layouts import write_tokens

    write_byte_tokenizer(folder / "tokenizer")
    return [
        "+model=tiny", "model.num_layers=4", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2",
        "model.ffn_hidden_size=64", "model.vocab_size=264", "model.seq_length=256", "model.init_std=0.1",
        f"data.train=[{write_tokens(folder)}]", f"data.tokenizer={folder}/tokenizer", "train.steps=1", "guard=off",
        "train.global_batch_size=16", "train.micro_batch_size=2", "train.eval_sequences=0", "evaluate.every=1", "device=cpu",
        "precision=fp32",
    ]  # fmt: skip


def score(words: list[str], folder: str) -> Iterator[list[Any]]:
    """On one rank: of each item the log-likelihoods of its choices, and what is chosen."""
    import torch.distributed as dist

    from megalm.config.compose import compose_config
    from megalm.evaluate.hook import SuiteHook
    from megalm.evaluate.measure import evaluate_task
    from megalm.launch.resolve import resolve
    from megalm.parallel.mesh import Mesh, build_mesh
    from megalm.train.parts import build_trainer

    config = compose_config(words)
    world = dist.get_world_size() if dist.is_initialized() else 1
    resolve(config, world)
    trainer = build_trainer(config, build_mesh(config.parallel, "cpu") if world > 1 else Mesh.single(), Path(folder))
    hook = SuiteHook(config, Path(folder), None)
    scorer = hook.make_scorer(trainer)
    results = [evaluate_task(task, hook.protocol, scorer, hook.tokenizer, limit=hook.limit) for task in hook.tasks]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    yield [(one.log_probabilities, one.chosen) for result in results for one in result.outcomes]


def compare(alone: list[Any], found: list[Any]) -> dict[str, Any]:
    """Count items that some rank decides otherwise than one process, and the largest difference of a log-likelihood."""
    differing, largest = 0, 0.0
    for rank in found:
        for (numbers, chosen), (own, own_chosen) in zip(alone, rank, strict=True):
            differing += chosen != own_chosen
            largest = max(largest, *(abs(a - b) for a, b in zip(numbers, own, strict=True)), 0.0)
    return {"items": len(alone), "decisions_that_differ": differing, "largest_difference": largest}
