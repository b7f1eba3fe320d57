"""A training step of this engine alone, in one process: what determinism, the guard and more micro-batches cost, where the time
goes, and its memory beside the plan."""

import argparse
import gc
import gzip
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megalm.config.errors import ConfigError

from ._shapes import MICRO_BATCH, SHAPES

HELP = "time this engine's training step: strict, fast, cuDNN first, 4 micro-batches; a profiled step; memory beside the plan"


@dataclass(frozen=True)
class Variant:
    """One way to make the same step."""

    determinism: str
    attention: str = "auto"
    micro_batches: int = 1
    guard: bool = False


VARIANTS = {
    "guarded": Variant("strict", guard=True),
    "strict": Variant("strict"),
    "fast": Variant("fast"),
    "cudnn": Variant("fast", attention="cudnn"),
    "flash": Variant("fast", attention="flash"),
    "strict-4": Variant("strict", micro_batches=4),
}
_LISTED = 40
"""Kernels of the profile that are written down: those that took longest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--shape", choices=SHAPES, default="1b", help="1.26G parameters (default), 8G, 50M or next to none"
    )
    parser.add_argument("--seq-length", type=int, help="positions of a sequence (default: the shape's)")
    parser.add_argument("--micro-batch", type=int, help="sequences of a micro-batch (default 4 on a GPU with 1b)")
    parser.add_argument(
        "--steps", type=int, default=6, help="measured of each variant, behind two that are not (default 6)"
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"comma-separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--override", action="append", default=[], help="optim.KEY=VALUE of the engine; repeatable")
    parser.add_argument("--profile", type=Path, help="write a step of the first variant as a trace, .json.gz")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file, after each variant")


def run(args: argparse.Namespace) -> int:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no GPU here; --device cpu tries the command.")
    names = [name.strip() for name in args.variants.split(",")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ConfigError(f"--variants {','.join(unknown)}: choose of {', '.join(VARIANTS)}.")
    shape = SHAPES[args.shape] | ({"seq_length": args.seq_length} if args.seq_length else {})
    bench = _StepBench(args, shape, args.micro_batch or MICRO_BATCH[args.shape, args.device])
    for name in names:
        bench.measure(name, VARIANTS[name])
        if args.profile and name == names[0]:
            bench.profile(args.profile)
    if args.json:
        print(json.dumps(bench.result))
    else:
        bench.print()
    return 1 if bench.result["failed"] else 0


class _StepBench:
    """One trainer; what varies is changed between its steps."""

    def __init__(self, args: argparse.Namespace, shape: dict[str, Any], micro_batch: int) -> None:
        from megalm.architecture.flops import count_flops_per_token
        from megalm.plan.machine import measure_this_machine
        from megalm.plan.memory import estimate

        self.args, self.shape, self.micro_batch = args, shape, micro_batch
        self.config = _compose(args, shape, micro_batch)
        machine = measure_this_machine().with_gpus(1)
        self.flops_per_token = count_flops_per_token(self.config.model)
        self.peak = None if machine.is_cpu else machine.peak(self.config.precision.dtype)
        self.result: dict[str, Any] = {
            "shape": shape | {"name": args.shape, "micro_batch_size": micro_batch},
            "device": args.device,
            "peak_flops": self.peak,
            "planned_bytes": estimate(self.config, machine).worst.as_dict(),
            "variants": {},
            "refused": {},
            "failed": {},
        }
        self._trainer: Any = None
        self._folder = tempfile.mkdtemp(prefix="megalm-bench-")

    def measure(self, name: str, variant: Variant) -> None:
        """Make steps of a variant and note what they took."""
        import torch

        try:
            trainer = self._prepare(variant)
            for _ in range(2):
                trainer.train_step()
            if self.args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = [self._time(trainer) for _ in range(self.args.steps)]
        except ConfigError as error:  # no kernel of this machine serves it
            self.result["refused"][name] = str(error)[:300]
            return
        except Exception as error:  # one that does not fit or is refused: the others are measured
            lines = str(error).strip().splitlines()
            self.result["failed"][name] = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
            self._trainer = None
            gc.collect()
            return
        finally:
            self._write()
        tokens = self.micro_batch * self.shape["seq_length"] * variant.micro_batches
        rate = tokens / median(seconds)
        found: dict[str, Any] = {"seconds": seconds, "tokens_per_second": rate, "attention": self._tell_attention()}
        if self.peak:
            found["mfu"] = rate * self.flops_per_token / self.peak
        if self.args.device == "cuda":
            found["allocated_bytes"] = torch.cuda.max_memory_allocated()
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        self.result["variants"][name] = found
        self._write()

    def _prepare(self, variant: Variant) -> Any:
        """The trainer, made once, as the variant wants it."""
        from megalm.train.determinism import choose_algorithms

        if self._trainer is None:
            self._trainer = _build(self.config, Path(self._folder), self.args.device)
        trainer = self._trainer
        choose_algorithms(variant.determinism, trainer.mesh.device)
        _attention_of(trainer).change(variant.attention, variant.determinism)
        trainer.batch_source.micro_batches = variant.micro_batches
        trainer.hooks = [trainer.guard] if variant.guard else []
        return trainer

    def _time(self, trainer: Any) -> float:
        """Seconds of one step: it reads its numbers from the device, so the host is behind all of it but the update."""
        import torch

        begun = time.perf_counter()
        trainer.train_step()
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def _tell_attention(self) -> list[str]:
        return [str(choice) for choice in _attention_of(self._trainer).list_choices()]

    def profile(self, out: Path) -> None:
        """A step as a trace, and the kernels that took longest."""
        from torch.profiler import ProfilerActivity, profile

        if self._trainer is None:
            return
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.args.device == "cuda" else [])]
        with profile(activities=kinds) as profiler:
            self._time(self._trainer)
        plain = Path(self._folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(out, "wb") as target:
            shutil.copyfileobj(source, target)
        on_device = self.args.device == "cuda"
        events = profiler.key_averages()
        spent = {e.key: (e.self_device_time_total if on_device else e.self_cpu_time_total, e.count) for e in events}
        longest = sorted(spent.items(), key=lambda item: -item[1][0])[:_LISTED]
        self.result["profile"] = [{"name": k[:120], "ms": t / 1e3, "count": n} for k, (t, n) in longest]
        self.result["launches"] = sum(e.count for e in events if e.key.startswith(("cudaLaunch", "cuLaunch")))
        self._write()

    def _write(self) -> None:
        if self.args.out:
            aside = self.args.out.with_name(self.args.out.name + ".new")
            aside.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            aside.replace(self.args.out)

    def print(self) -> None:
        """The table."""
        planned = self.result["planned_bytes"]
        print(
            f"{self.args.shape} on {self.args.device}: {self.micro_batch} x {self.shape['seq_length']} tokens a micro-batch"
        )
        heads = f"{'':<10} {'ms a step':>10} {'tokens/s':>10} {'MFU':>7} {'allocated':>10}"
        print(f"{heads}   planned {planned['total_bytes'] / 2**30:.2f} GiB")
        for name, found in self.result["variants"].items():
            mfu = f"{100 * found['mfu']:.1f}%" if "mfu" in found else ""
            memory = f"{found['allocated_bytes'] / 2**30:.2f}" if "allocated_bytes" in found else ""
            milliseconds = 1e3 * median(found["seconds"])
            print(f"{name:<10} {milliseconds:>10.1f} {found['tokens_per_second']:>10,.0f} {mfu:>7} {memory:>10}")
            for line in found["attention"]:
                print(f"           {line}")
        for kind in ("refused", "failed"):
            for name, why in self.result[kind].items():
                print(f"{name} {kind}: {why}")


def _attention_of(trainer: Any) -> Any:
    """What chooses attention's kernels, which all layers share on one rank."""
    from megalm.model.attention_core import AttentionCore

    return next(layer.kernels for layer in trainer.model_chunks[0].modules() if isinstance(layer, AttentionCore))


def _compose(args: argparse.Namespace, shape: dict[str, Any], micro_batch: int) -> Any:
    """The engine's configuration of the shape, with what was overridden in optim."""
    from ._sides import Job, compose_our_config

    dtype = "bf16" if args.device == "cuda" else "fp32"
    config = compose_our_config(Job(shape, micro_batch, dtype, args.device, 1, "", False))
    for override in args.override:
        key, _, value = override.partition("=")
        group, _, name = key.partition(".")
        if group != "optim" or not hasattr(config.optim, name):
            raise ConfigError(f"--override {override}: optim.KEY=VALUE of the engine's settings.")
        setattr(config.optim, name, value)
    config.train.steps = 1_000_000
    config.train.eval_every = 0
    config.guard.act = False
    config.guard.snapshot_lags = []
    config.guard.replay = False
    return config


def _build(config: Any, folder: Path, device: str) -> Any:
    """Build a trainer over one batch, again and again, with a guard that may stand beside it."""
    import torch

    from megalm.guard.hook import GuardHook
    from megalm.parallel.mesh import Mesh
    from megalm.train.parts import build_trainer

    mesh = Mesh.single(torch.device(device, 0) if device == "cuda" else device)
    trainer = build_trainer(config, mesh, folder, batch_source=_repeat_batch(config, mesh.device))
    trainer.guard = GuardHook(config.guard)  # type: ignore[attr-defined]
    return trainer


def _repeat_batch(config: Any, device: Any) -> Any:
    """A source of one batch of random tokens, on the device already."""
    import numpy as np
    import torch

    from megalm.data.batch import Batch
    from megalm.data.phases import Phase
    from megalm.train.batch_source import BatchSource

    rows, length = config.train.micro_batch_size, config.model.seq_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (rows, length + 1), generator=generator).to(device)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    class Repeated(BatchSource):
        source_names: list[str] = ["random"]
        samples_consumed = 0
        micro_batches = 1

        @property
        def phase(self) -> Phase:
            return Phase("", 0, None, length, rows * self.micro_batches, {"random": 1.0})

        def next(self) -> list[Batch]:
            return [batch] * self.micro_batches

        def next_positions(self) -> Any:
            return np.zeros(rows, np.int64)

        def phase_at(self, step: int) -> Phase:
            return self.phase

        def evaluation_batches(self, sequences: int | None = None) -> list[Batch]:
            return []

        def describe(self, positions: Any) -> list[dict[str, Any]]:
            return [{"source": "random", "document": 0, "offset": 0} for _ in positions]

        def reseed(self, seed: int, position: int | None = None) -> bool:
            return False

        def skip(self, first_sample: int, last_sample: int) -> None:
            """There is one batch, whatever is skipped."""

        def bind(self, engine: Any) -> None:
            """It needs no engine."""

        def measure(self) -> dict[str, float]:
            return {}

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """There is none."""

        def close(self) -> None:
            """Nothing runs."""

    return Repeated()
