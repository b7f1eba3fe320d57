"""Training throughput beside Hugging Face transformers: the same shape, alternating in one run."""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

HELP = "train a 50M-parameter Llama shape in Hugging Face transformers and in megalm, alternating; tokens/s and ratio"

SHAPE: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_heads": 8,
    "ffn_hidden_size": 1408,
    "vocab_size": 32000,
    "seq_length": 512,
}
MICRO_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=6, help="rounds of one measurement each (default 6)")
    parser.add_argument("--steps", type=int, default=2, help="training steps in one measurement (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="weights and activations (default fp32)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as folder:
        sides = {name: _Side(name, folder, args.dtype, args.threads) for name in SIDES}
        for _ in range(args.rounds):
            for name, side in sides.items():
                seconds, losses[name] = side.run(args.steps)
                times[name].append(seconds / args.steps)
        device = [side.close() for side in sides.values()][0]
    tokens = MICRO_BATCH * SHAPE["seq_length"]
    ratios = [peer / ours for peer, ours in zip(times["transformers"], times["megalm"], strict=True)]
    result = {
        "shape": SHAPE | {"micro_batch_size": MICRO_BATCH, "dtype": args.dtype},
        "device": device,
        "threads": args.threads,
        "rounds": args.rounds,
        "tokens_per_second": {name: tokens / median(values) for name, values in times.items()},
        "tokens_per_second_best": {name: tokens / min(values) for name, values in times.items()},
        "ratio": median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "last_loss": losses,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{device}, {args.threads} threads, {args.dtype}; {args.rounds} rounds of {args.steps} steps, alternating")
    print(f"{'':<14} {'tokens/s':>10} {'best':>10} {'last loss':>10}")
    for name in SIDES:
        median_rate, best = result["tokens_per_second"][name], result["tokens_per_second_best"][name]
        print(f"{name:<14} {median_rate:>10,.0f} {best:>10,.0f} {losses[name]:>10.4f}")
    print(f"megalm / transformers: {result['ratio']:.3f} (median of rounds; {min(ratios):.3f} to {max(ratios):.3f})")
    return 0


SIDES = ("transformers", "megalm")


class _Side:
    """One of the two in a process of its own, as its users run it; it starts with one step that is not measured."""

    def __init__(self, name: str, folder: str, dtype: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, folder, dtype, threads), daemon=True)
        self._process.start()
        other.close()
        self.device = self._answer()

    def run(self, steps: int) -> tuple[float, float]:
        """(seconds of these steps, loss of the last one)"""
        self._pipe.send(steps)
        return self._answer()

    def close(self) -> str:
        """Ends the process; returns the device that it trained on."""
        self._pipe.send(0)
        self._process.join()
        return self.device

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"the process of {self._process.name} ended early, with its own message above") from None


def _serve(pipe: Connection, name: str, folder: str, dtype: str, threads: int) -> None:
    """Steps on request; transformers, which comes first, leaves the weights in the folder, megalm starts from them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    if name == "transformers":
        step = _peer_step(_peer(device, Path(folder)), device, dtype)
    else:
        step = _our_step(Path(folder), device, dtype)
    step()
    pipe.send(device)
    while steps := pipe.recv():
        begun = time.perf_counter()
        for _ in range(steps):
            loss = step()
        pipe.send((time.perf_counter() - begun, loss))


def _batches(device: str):
    """The same random tokens for both."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPE["vocab_size"], (MICRO_BATCH, SHAPE["seq_length"] + 1), generator=generator)
    return tokens.to(device)


def _peer(device: str, folder: Path) -> Any:
    """LlamaForCausalLM with random weights, which are also written to the folder: both train from the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SHAPE["hidden_size"],
            intermediate_size=SHAPE["ffn_hidden_size"],
            num_hidden_layers=SHAPE["num_layers"],
            num_attention_heads=SHAPE["num_heads"],
            num_key_value_heads=SHAPE["num_heads"],
            vocab_size=SHAPE["vocab_size"],
            max_position_embeddings=SHAPE["seq_length"],
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).to(device)
    model.save_pretrained(folder)
    return model


def _peer_step(model: Any, device: str, dtype: str) -> Callable[[], float]:
    """torch's fused AdamW, without decay on norms and embeddings, and clipping; bf16 by autocast with fp32 weights."""
    import torch

    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and "embed" not in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    tokens = _batches(device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, SHAPE["vocab_size"]).float(), labels.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _our_step(folder: Path, device: str, dtype: str) -> Callable[[], float]:
    """The trainer's own pieces: model, executor, sharded optimizer, one statistics message, clipping."""
    import torch

    from megalm import ops
    from megalm.build import build_chunks, schedule_of
    from megalm.checkpoint.convert.formats import open_source
    from megalm.config import Config
    from megalm.data.batch import Batch
    from megalm.evaluate.model import fill
    from megalm.optim.sharded import ShardedOptimizer
    from megalm.parallel.mesh import Mesh
    from megalm.pipeline.execute import Executor

    if device == "cpu":
        ops.keep_freed_memory()  # as each rank of a run does
    source = open_source(folder)
    config = Config(model=source.model)
    config.train.global_batch_size = config.train.micro_batch_size = MICRO_BATCH
    config.precision.dtype = dtype
    mesh = Mesh.single(device)
    chunks = build_chunks(config, mesh)
    with torch.no_grad():
        fill(chunks[0], source.weights)
    optimizer = ShardedOptimizer(chunks, config.optim, config.precision, mesh, config.parallel)
    executor = Executor(
        chunks,
        schedule_of(config),
        mesh.pipeline,
        micro_batch_size=MICRO_BATCH,
        seq_length=SHAPE["seq_length"],
        hidden_size=SHAPE["hidden_size"],
        device=device,
    )
    tokens = _batches(device)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    count = batch.tokens.numel()

    def step() -> float:
        optimizer.begin_step(1)
        reports = executor.run([batch], scale=1.0 / count)
        optimizer.finish_gradients()
        norm, _, extra = optimizer.statistics(extra=reports[0])
        grad_norm, loss_sum = torch.stack([norm, extra[0]]).tolist()
        optimizer.step(1e-4, grad_scale=min(1.0, 1.0 / (grad_norm + 1e-6)))
        return loss_sum / count

    return step
