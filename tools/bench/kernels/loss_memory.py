"""Peak memory and time of a training step with a large vocabulary: the loss in chunks of positions, with all logits at
once, and as plain PyTorch computes it; each in a process of its own."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HELP = "peak memory of a training step with a 128k vocabulary: loss in chunks, whole, and plain PyTorch's"

SHAPE: dict[str, Any] = {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "ffn_hidden_size": 1408}
VARIANTS = {
    "plain": "all logits; torch.nn.functional.cross_entropy",
    "whole": "all logits; the fused kernel, gradient over the logits",
    "chunks": "never all logits (parallel.loss_chunk)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab-size", type=int, default=131072, help="vocabulary (default 131072)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a sequence (default 512)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a step (default 4)")
    parser.add_argument("--tied", action="store_true", help="one matrix for embedding and output")
    parser.add_argument("--steps", type=int, default=2, help="steps, after one that warms up (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)  # what a process of its own measures


def run(args: argparse.Namespace) -> int:
    if args.one:
        print(json.dumps(_measure(args)))
        return 0
    results = {}
    for name in VARIANTS:
        command = [sys.executable, "-m", "tools.bench", "loss_memory", "--one", name]
        for option in ("vocab_size", "seq_length", "micro_batch", "steps", "threads"):
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        command += ["--tied"] if args.tied else []
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
    plain = results["plain"]["step_bytes"]
    for result in results.values():
        result["of_plain"] = result["step_bytes"] / plain
    shape = SHAPE | {"vocab_size": args.vocab_size, "seq_length": args.seq_length, "tied": args.tied}
    table = {"shape": shape, "micro_batch_size": args.micro_batch, "threads": args.threads, "variants": results}
    if args.out:
        args.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(table))
        return 0
    print(f"{args.micro_batch} x {args.seq_length} tokens, vocabulary {args.vocab_size}, {args.threads} threads")
    print(f"{'':<8}{'peak of a step':>15}{'of plain':>10}{'s a step':>10}{'loss':>10}")
    for name, result in results.items():
        print(
            f"{name:<8}{result['step_bytes'] / 1e9:>12.2f} GB{result['of_plain']:>10.0%}{result['seconds']:>10.2f}"
            f"{result['loss']:>10.4f}   {VARIANTS[name]}"
        )
    print("(weights, gradients and optimizer state included; Python and its libraries not)")
    return 0


def _measure(args: argparse.Namespace) -> dict[str, float]:
    """This process's peak over a few steps, without what it held before the model was built."""
    import torch
    import torch.nn.functional as F

    from megalm.config import Config, ModelConfig
    from megalm.data.batch import Batch
    from megalm.model import head
    from megalm.optim.sharded import ShardedOptimizer
    from megalm.parallel.mesh import Mesh
    from megalm.pipeline.execute import Executor
    from megalm.train.build import build_chunks, choose_schedule

    def plain_loss(logits: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.reshape(-1), reduction="none").view(labels.shape)

    torch.set_num_threads(args.threads)
    config = Config(
        model=ModelConfig(
            name="bench", vocab_size=args.vocab_size, seq_length=args.seq_length, tie_embeddings=args.tied, **SHAPE
        )
    )
    config.model.fill_in()
    config.train.global_batch_size = config.train.micro_batch_size = args.micro_batch
    if args.one != "chunks":
        config.parallel.loss_chunk = 0
    if args.one == "plain":
        head.vocabulary_parallel_cross_entropy = plain_loss
    # What was imported and touched so far is not the step's.
    before = _peak()
    mesh = Mesh.single("cpu")
    chunks = build_chunks(config, mesh)
    optimizer = ShardedOptimizer(chunks, config.optim, mesh, config.parallel)
    executor = Executor(
        chunks,
        choose_schedule(config),
        mesh.pipeline,
        micro_batch_size=args.micro_batch,
        seq_length=args.seq_length,
        hidden_size=SHAPE["hidden_size"],
        device="cpu",
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(args.vocab_size, (args.micro_batch, args.seq_length + 1), generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    times, loss = [], 0.0
    for _ in range(args.steps + 1):
        begun = time.perf_counter()
        optimizer.begin_step(1)
        reports = executor.run([batch], scale=1.0 / batch.tokens.numel())
        optimizer.finish_gradients()
        norm, *_ = optimizer.statistics()
        optimizer.step(1e-4, grad_scale=min(1.0, 1.0 / (float(norm) + 1e-6)))
        loss = float(reports[0]["loss"]) / batch.tokens.numel()
        times.append(time.perf_counter() - begun)
    return {"step_bytes": _peak() - before, "process_bytes": _peak(), "seconds": median(times[1:]), "loss": loss}


def _peak() -> int:
    """Bytes that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
