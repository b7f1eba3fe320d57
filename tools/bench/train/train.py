"""Training throughput beside Hugging Face transformers: the same shape, in turns, in one run."""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from megalm.config.errors import ConfigError

from . import _matrix
from ._shapes import MICRO_BATCH, SHAPES
from ._sides import EXPERTS, SIDES, TOP_K, Job, Side, SideEnded, compose_our_config

HELP = (
    "train a Llama or Mixtral shape in Hugging Face transformers and in megalm, in turns: tokens/s, their share of the matmul "
    "rate (on a GPU MFU), memory, and the ratio"
)

DENSE_SIDE = "megalm-dense"
DEFAULT_SIDES = {"cpu": ("transformers", "megalm"), "cuda": tuple(name for name in SIDES if name != DENSE_SIDE)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="50m", help="50M, 1.26G or 8G parameters (default 50m)")
    parser.add_argument("--seq-length", type=int, help="positions of a sequence (default: the shape's)")
    parser.add_argument(
        "--model",
        choices=("dense", "moe"),
        default="dense",
        help=f"moe: a mixture of {EXPERTS} experts, of which a token goes to {TOP_K}, at the shape's active size (default dense)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--sides", help=f"comma-separated, of {', '.join(SIDES)}; default: all on a GPU, the first two on a CPU"
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds of one measurement each (default 6)")
    parser.add_argument("--steps", type=int, help="training steps in one measurement (default 2; on a GPU 10)")
    parser.add_argument("--micro-batch", type=int, help="sequences in a step (default 4; on a GPU 32, 4 with 1b)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the products (default fp32; on a GPU bf16)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so many seconds")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file, after each round")


def run(args: argparse.Namespace) -> int:
    device = args.device if args.device != "auto" else "cuda" if _sees_gpu() else "cpu"
    if device == "cuda" and not _sees_gpu():
        raise ConfigError("--device cuda, but torch sees no GPU here.")
    names, left_out = _choose(args.sides, device, args.model)
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as folder:
        job = Job(
            shape=SHAPES[args.shape] | ({"seq_length": args.seq_length} if args.seq_length else {}),
            micro_batch=args.micro_batch or MICRO_BATCH[args.shape, device],
            dtype=args.dtype or ("bf16" if device == "cuda" else "fp32"),
            device=device,
            threads=args.threads,
            folder=folder,
            mixture=args.model == "moe",
            # Of the large shape they would be gigabytes on a disk.
            shared_weights=args.shape == "50m" and "transformers" in names,
        )
        race = _Race(job, names, args)
        race.result["left_out"] = left_out
        race.run(together=args.shape == "50m")
    if args.json:
        print(json.dumps(race.result))
    else:
        race.print()
    return 1 if race.result["failed"] else 0


def _choose(wanted: str | None, device: str, model: str = "dense") -> tuple[list[str], dict[str, str]]:
    """Choose the sides in the order in which they begin, and those that cannot run here, with the reason."""
    default = [*DEFAULT_SIDES[device], *([DENSE_SIDE] if model == "moe" else [])]
    names = default if wanted is None else [name.strip() for name in wanted.split(",")]
    if unknown := [name for name in names if name not in SIDES]:
        raise ConfigError(f"--sides {','.join(unknown)}: choose of {', '.join(SIDES)}.")
    if model == "moe":
        names = [name for name in names if not name.startswith("plain") or wanted is not None]
        if plain := [name for name in names if name.startswith("plain")]:
            raise ConfigError(f"--sides {','.join(plain)} is a dense model: leave it out, or --model moe.")
    if DENSE_SIDE in names and model != "moe":
        raise ConfigError(f"--sides {DENSE_SIDE} stands beside a mixture: add --model moe, or leave it out.")
    left_out = {}
    if importlib.util.find_spec("transformers") is None:
        left_out = {name: "transformers is not installed" for name in names if name.startswith("transformers")}
    return [name for name in SIDES if name in names and name not in left_out], left_out


class _Race:
    """The measurement: rounds in which each side makes some steps."""

    def __init__(self, job: Job, names: list[str], args: argparse.Namespace) -> None:
        self.job, self.names = job, names
        self.rounds, self.out = args.rounds, args.out
        self.steps = args.steps or (10 if job.device == "cuda" else 2)
        self.end = time.monotonic() + args.seconds
        self.times: dict[str, list[float]] = {}
        self.result: dict[str, Any] = {
            "shape": job.shape | {"name": args.shape, "micro_batch_size": job.micro_batch, "dtype": job.dtype},
            "model": args.model,
            "device": job.device,
            "threads": job.threads,
            "rounds": args.rounds,
            "steps": self.steps,
            "last_loss": {},
            "failed": {},
        }
        self.matrix_flops: list[float] = []
        if job.device == "cuda":
            self.result |= _gpu(job)
        else:
            self.result["flops_per_token"] = _flops_per_token(job)

    def run(self, together: bool) -> None:
        """together: all sides are in memory at a time and take turns; else one after the other makes all its rounds."""
        for group in [self.names] if together else [[name] for name in self.names]:
            sides = self._start(group)
            try:
                for _ in range(self.rounds):
                    if time.monotonic() > self.end and all(side.name in self.times for side in sides):
                        break
                    if self.job.device == "cpu":  # beside the steps: the machine's own rate changes, too
                        self.matrix_flops.append(
                            _matrix.measure_matrix_flops(self.job.dtype, self.job.threads, _matrix.SIZE)
                        )
                    for side in [side for side in sides if side.name not in self.result["failed"]]:
                        self._measure(side)
                    self._note()
            finally:
                for side in sides:
                    side.close()

    def _start(self, names: list[str]) -> list[Side]:
        sides = []
        for name in names:
            left = self.end - time.monotonic()
            if left <= 0:
                self.result["failed"][name] = "not begun: out of time"
                continue
            side = Side(name, self.job)
            try:
                if side.ready(None if left == float("inf") else left):
                    sides.append(side)
                    continue
                self.result["failed"][name] = "its first steps were not done in time"
            except SideEnded as error:
                self.result["failed"][name] = str(error)
            side.close()
            if name == "transformers":  # its weights may not be there
                self.job = replace(self.job, shared_weights=False)
        return sides

    def _measure(self, side: Side) -> None:
        try:
            seconds, self.result["last_loss"][side.name] = side.run(self.steps)
        except SideEnded as error:
            self.result["failed"][side.name] = str(error)
            return
        self.times.setdefault(side.name, []).append(seconds / self.steps)
        if side.memory:
            self.result.setdefault("measured_bytes", {})[side.name] = side.memory

    def _note(self) -> None:
        """What is known so far, in the result and in the file."""
        tokens, result = self.job.tokens, self.result
        result["tokens_per_second"] = {name: tokens / median(values) for name, values in self.times.items()}
        result["tokens_per_second_best"] = {name: tokens / min(values) for name, values in self.times.items()}
        per_token, rates = result["flops_per_token"], result["tokens_per_second"].items()
        if result.get("peak_flops"):
            result["mfu"] = {name: per_token * rate / result["peak_flops"] for name, rate in rates}
        if self.matrix_flops:
            measured = median(self.matrix_flops)
            result["matrix_flops"] = {
                "median": measured, "lowest": min(self.matrix_flops), "highest": max(self.matrix_flops),
                "size": _matrix.SIZE,
            }  # fmt: skip
            result["matrix_share"] = {name: per_token * rate / measured for name, rate in rates}
        shares = result.get("matrix_share") or result.get("mfu") or {}
        result["ratios"] = {}
        for name, values in self.times.items():
            if name == "megalm" or "megalm" not in self.times:
                continue
            ratios = [peer / ours for peer, ours in zip(values, self.times["megalm"], strict=False)]
            result["ratios"][name] = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            if shares:
                result["ratios"][name]["shares"] = {"megalm": shares["megalm"], name: shares[name]}
        if self.out:
            aside = self.out.with_name(self.out.name + ".new")
            aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            aside.replace(self.out)

    def print(self) -> None:
        """The table."""
        result, job = self.result, self.job
        where = result.get("gpu", f"{job.device}, {job.threads} threads")
        print(f"{where}, {job.dtype}, {job.tokens:,} tokens a step; rounds of {self.steps} steps")
        shares = result.get("matrix_share") or result.get("mfu") or {}
        of = "of matmul" if "matrix_share" in result else "MFU"
        if "matrix_flops" in result:
            rate = result["matrix_flops"]
            print(
                f"matmul of {rate['size']} x {rate['size']} in {job.dtype}, measured between the rounds: "
                f"{rate['median'] / 1e9:,.0f} GFLOP/s ({rate['lowest'] / 1e9:,.0f} to {rate['highest'] / 1e9:,.0f})"
            )
        print(f"{'':<22} {'tokens/s':>11} {'best':>11} {of:>9} {'memory, GiB':>12} {'last loss':>10}")
        for name in self.times:
            mfu = f"{100 * shares[name]:.1f}%" if shares else ""
            held = result.get("measured_bytes", {}).get(name)
            memory = f"{held['allocated'] / 2**30:.2f}" if held else ""
            rate, best = result["tokens_per_second"][name], result["tokens_per_second_best"][name]
            print(f"{name:<22} {rate:>11,.0f} {best:>11,.0f} {mfu:>9} {memory:>12} {result['last_loss'][name]:>10.4f}")
        for name, ratio in result.get("ratios", {}).items():
            lowest, highest = ratio["lowest"], ratio["highest"]
            line = f"megalm / {name}: {ratio['median']:.3f} (median of rounds; {lowest:.3f} to {highest:.3f})"
            if "shares" in ratio:
                what = "the machine's matmul rate" if "matrix_share" in result else "the peak"
                ours, theirs = ratio["shares"]["megalm"], ratio["shares"][name]
                line += f", at {100 * ours:.1f}% and {100 * theirs:.1f}% of {what}"
            print(line)
        if "planned" in result and "megalm" in result.get("measured_bytes", {}):
            planned, measured = result["planned"], result["measured_bytes"]["megalm"]
            print(
                f"megalm's memory: planned {planned['bytes'] / 2**30:.2f} GiB ({planned['runtime_bytes'] / 2**30:.2f} of it for "
                f"contexts and gaps); allocated {measured['allocated'] / 2**30:.2f}, reserved {measured['reserved'] / 2**30:.2f}"
            )
        for name, why in {**result["left_out"], **result["failed"]}.items():
            print(f"{name}: {why}")


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _flops_per_token(job: Job) -> float:
    from megalm.architecture.flops import count_flops_per_token

    return count_flops_per_token(compose_our_config(job).model)


def _gpu(job: Job) -> dict[str, Any]:
    """The device, its peak, the FLOPs of a token, and the memory that the plan foretells."""
    import torch

    from megalm.plan.machine import measure_this_machine
    from megalm.plan.memory import estimate

    config, machine = compose_our_config(job), measure_this_machine().with_gpus(1)
    planned = estimate(config, machine).worst
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "peak_flops": None if machine.is_cpu else machine.peak(job.dtype),
        "flops_per_token": _flops_per_token(job),
        "planned": {"bytes": planned.total, "runtime_bytes": planned.runtime},
    }
