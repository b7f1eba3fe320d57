"""How long a save keeps the step waiting, and how fast it reaches the disk, beside torch's own and bare copies."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HELP = "stall and write speed of a save, beside a bare memory copy, torch's dcp.async_save, dd and a training step"

# One tensor of the made-up model: 16 MB of fp32, about a feed-forward matrix of a 1B model.
TENSOR_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=1024, help="what one save holds (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of one measurement each (default 5)")
    parser.add_argument("--steps", type=int, default=8, help="saves of a run of +model=tiny, 0: none (default 8)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: the temporary one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.folder) as folder:
        result = _measure(Path(folder), args.megabytes << 20, args.rounds, args.threads)
        _write(args, result)
        if args.steps:
            result["tiny"] = _measure_run(Path(folder), args.steps, args.threads)
            _write(args, result)
    if args.json:
        print(json.dumps(result))
        return 0
    print(
        f"{result['bytes'] / 1e9:.2f} GB in {result['tensors']} tensors, {args.threads} threads; medians of {args.rounds}"
    )
    print(f"{'':<22} {'stall s':>9} {'until durable s':>16} {'MB/s':>8}")
    for name, row in result["methods"].items():
        stall = f"{row['stall_s']:.3f}" if row["stall_s"] is not None else ""
        durable = f"{row['durable_s']:.2f} " if row["durable_s"] is not None else ""
        rate = f"{result['bytes'] / row['write_s'] / 1e6:.0f}" if row["write_s"] else ""
        print(f"{name:<22} {stall:>9} {durable:>16} {rate:>8}")
    print(
        f"stall / bare copy: {result['stall_over_copy']:.2f}   dcp stall / ours: {result['dcp_stall_over_ours']:.2f}   "
        f"write speed / dd: {result['write_over_dd']:.2f}   (medians of the rounds' ratios)"
    )
    if args.steps:
        tiny = result["tiny"]
        print(
            f"+model=tiny ({tiny['bytes'] / 1e6:.0f} MB a save, step {tiny['step_s']:.2f} s): a save stalls it for "
            f"{tiny['stall_s'] * 1e3:.1f} ms, {tiny['stall_over_step']:.1%} of a step; the step beside the writing takes "
            f"{tiny['step_beside_writing_s'] / tiny['step_s']:.2f} of one without"
        )
    return 0


def _write(args: argparse.Namespace, result: dict) -> None:
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _measure(folder: Path, size: int, rounds: int, threads: int) -> dict:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from megalm.checkpoint.checkpointer import Checkpointer
    from megalm.config import CheckpointConfig
    from megalm.parallel.mesh import Mesh
    from megalm.parallel.slices import Box

    torch.set_num_threads(threads)
    count = max(1, size // TENSOR_BYTES)
    shape = (1024, TENSOR_BYTES // 4096)
    flat = torch.zeros(count, *shape)
    boxes = [Box(f"layers.{i}.mlp.up.weight", shape, (0, 0), flat[i]) for i in range(count)]
    state_dict = {box.name: box.tensor for box in boxes}
    total = flat.nbytes
    bare = torch.zeros_like(flat)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ours = Checkpointer(folder / "ours", CheckpointConfig(keep=1), Mesh.single())
    rows: list[dict[str, float]] = []
    for step in range(rounds + 1):
        flat.add_(1.0)
        row: dict[str, float] = {}
        row["copy"] = _timed(lambda: [bare[i].copy_(flat[i]) for i in range(count)])
        begun = time.perf_counter()
        ours.save(step, boxes, {}, {})
        row["stall"] = time.perf_counter() - begun
        ours.wait()
        row["durable"] = time.perf_counter() - begun
        row["write"] = row["durable"] - row["stall"]
        target = folder / f"dcp-{step}"
        begun = time.perf_counter()
        future: Any = dcp.async_save(state_dict, checkpoint_id=target)
        row["dcp_stall"] = time.perf_counter() - begun
        future.result()
        row["dcp_durable"] = time.perf_counter() - begun
        shutil.rmtree(target)
        blocks = f"count={total >> 20}"
        command = ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=1M", blocks, "conv=fsync", "status=none"]
        row["dd"] = _timed(lambda command=command: subprocess.run(command, check=True))
        (folder / "dd").unlink()
        if step:  # the first round allocates buffers: not what a run meets at every save
            rows.append(row)
        else:
            first_stall = row["stall"]
    ours.close()
    dist.destroy_process_group()

    def middle(key: str) -> float:
        return median(row[key] for row in rows)

    def ratio(over: str, under: str) -> float:
        return median(row[over] / row[under] for row in rows)

    return {
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
        "bytes": total,
        "tensors": count,
        "threads": threads,
        "rounds": rounds,
        "methods": {
            "bare memory copy": {"stall_s": middle("copy"), "durable_s": None, "write_s": None},
            "megalm": {"stall_s": middle("stall"), "durable_s": middle("durable"), "write_s": middle("write")},
            "dcp.async_save": {
                "stall_s": middle("dcp_stall"),
                "durable_s": middle("dcp_durable"),
                "write_s": median(row["dcp_durable"] - row["dcp_stall"] for row in rows),
            },
            "dd conv=fsync": {"stall_s": None, "durable_s": middle("dd"), "write_s": middle("dd")},
        },
        "first_stall_s": first_stall,
        "stall_over_copy": ratio("stall", "copy"),
        "dcp_stall_over_ours": ratio("dcp_stall", "stall"),
        "write_over_dd": ratio("dd", "write"),
        "all_rounds": rows,
    }


def _measure_run(folder: Path, saves: int, threads: int) -> dict:
    """Measure steps of `+model=tiny` with its own batch: alone, stalled by a save, and beside the writing of one."""
    import torch

    from megalm.config.compose import compose_config
    from megalm.launch.resolve import resolve
    from megalm.parallel.mesh import Mesh
    from megalm.train.parts import build_trainer

    from ..layouts.layouts import write_tokens

    torch.set_num_threads(threads)
    config = compose_config(
        ["+model=tiny", f"data.train=[{write_tokens(folder)}]", "data.tokenizer=null", "train.sample=false"]
        + ["train.steps=1000", "train.eval_every=0", "checkpoint.every=0", "checkpoint.keep=1", "device=cpu"]
    )
    resolve(config, 1)
    (folder / "run").mkdir()
    trainer = build_trainer(config, Mesh.single(), folder / "run")
    rows: list[dict[str, float]] = []
    for number in range(saves + 1):
        row = {"step": _timed(trainer.train_step), "stall": _timed(trainer.save), "beside": _timed(trainer.train_step)}
        trainer.checkpoints.wait()
        if number:
            rows.append(row)
    size = sum(box.tensor.nbytes for box in trainer.boxes())
    trainer.checkpoints.close()
    trainer.batch_source.close()
    trainer.events.close()
    return {
        "bytes": size,
        "tokens_a_step": config.train.global_batch_size * config.model.seq_length,
        "saves": saves,
        "step_s": median(row["step"] for row in rows),
        "stall_s": median(row["stall"] for row in rows),
        "step_beside_writing_s": median(row["beside"] for row in rows),
        "stall_over_step": median(row["stall"] / row["step"] for row in rows),
        "all_saves": rows,
    }


def _timed(action) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun
