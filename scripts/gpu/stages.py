"""What is run on a GPU, as data: two calls, A (is it right, and where does the time go) and B (beside others), stage by stage.

Each stage has a time limit and commands that write their results as they go. `pretend` are the same commands at tiny sizes on
a CPU: they try the script, not the GPU. In both, {out} is the stage's own folder, {device} the device.
"""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 330
"""Seconds of one call, so that two, each with a minute and a half to get a machine, fit a quarter of an hour."""


@dataclass(frozen=True)
class Stage:
    """One thing to find out."""

    name: str
    says: str
    seconds: int
    """At most; a command that still runs then is interrupted and keeps what it has written."""
    commands: tuple[str, ...]
    pretend: tuple[str, ...]
    needs_build: bool = True
    needs: str = ""
    """A module or program without which it is skipped, and that is said."""


_TESTS = "-p no:cacheprovider -q -rs --durations 5"
_TINY_RUN = "--override model.num_layers=1 --override model.hidden_size=32 --override model.num_heads=2"
_TINY_RUN += " --override model.ffn_hidden_size=64 --override model.seq_length=64"

BUILD = Stage(
    "build",
    "the extension, for this machine's GPU, against its torch; in the background of what needs no extension",
    120,
    ("python -m scripts.gpu.build --device {device}",),
    ("python -m scripts.gpu.build --device {device}",),
    needs_build=False,
)

CALLS: dict[str, tuple[Stage, ...]] = {
    "A": (
        Stage(
            "probe",
            "torch alone: which attention it would take, copies, the models' products, attention forward and backward with "
            "20 repetitions bit by bit, 8-bit products, copies from and to the host",
            60,
            ("python -m scripts.gpu.probe --device {device} --out {out}/probe.json",),
            ("python -m scripts.gpu.probe --device {device} --tiny --out {out}/probe.json",),
            needs_build=False,
        ),
        Stage(
            "test",
            "tests/gpu, and every op's tests on CUDA in bf16 (torch.compile's take minutes, and are left out)",
            65,
            (
                f'python -m pytest tests/gpu tests/ops -k "(cuda and bf16 or test_cuda) and not compile" -p xdist -n 6 {_TESTS}',
            ),
            (
                f'python -m pytest tests/gpu/test_cuda_bench.py tests/ops/test_rope.py -k "cpu and bf16 or test_cuda" {_TESTS}',
            ),
        ),
        Stage(
            "kernels",
            "each kernel beside eager PyTorch and the libraries that are installed, at hidden sizes 4096 and 2048",
            50,
            (
                "python -m tools.bench kernels --device cuda --no-compile --rounds 5 --out {out}/kernels-4096.json",
                "python -m tools.bench kernels --device cuda --size 1b --no-compile --rounds 5 --out {out}/kernels-2048.json",
            ),
            ("python -m tools.bench kernels --size tiny --threads 1 --no-compile --rounds 1 --out {out}/kernels.json",),
        ),
        Stage(
            "step",
            "a training step of 1.3G parameters at 4 x 4096: strict with the guard, strict, fast, cuDNN first, 4 micro-batches; "
            "a profiled step; memory beside the plan",
            95,
            (
                "python -m tools.bench step --device cuda --shape 1b --seq-length 4096 --micro-batch 4 --steps 6 "
                "--profile {out}/trace.json.gz --out {out}/step.json",
            ),
            (
                "python -m tools.bench step --device cpu --shape tiny --micro-batch 2 --steps 1 "
                "--profile {out}/trace.json.gz --out {out}/step.json",
            ),
        ),
        Stage(
            "device_run",
            "the tiny model by the command line, killed and taken up again, beside the same run on the CPU",
            50,
            ("python -m tools.bench device_run --steps 30 --seconds 48 --out {out}/device-run.json",),
            (
                f"python -m tools.bench device_run --device cpu --steps 240 --batch 8 --seconds 48 --out {{out}}/device-run.json "
                f"{_TINY_RUN}",
            ),
            needs="hydra",
        ),
    ),
    "B": (
        Stage(
            "beside",
            "1.3G parameters at 4 x 4096, equal tokens, in turn: this engine, a compiled plain Llama, transformers compiled",
            130,
            (
                "python -m tools.bench train --device cuda --shape 1b --seq-length 4096 --micro-batch 4 --rounds 3 --steps 4 "
                "--sides megalm,plain-compiled,transformers-compiled --seconds 125 --out {out}/train.json",
            ),
            (
                "python -m tools.bench train --device cpu --shape tiny --rounds 1 --steps 1 --threads 1 "
                "--sides megalm,plain-compiled --seconds 60 --out {out}/train.json",
            ),
        ),
        Stage(
            "8b",
            "five steps of 8G parameters at 1 x 8192, memory beside the plan",
            75,
            (
                "python -m tools.bench step --device cuda --shape 8b --seq-length 8192 --micro-batch 1 --steps 5 "
                "--variants strict --out {out}/step-8b.json",
            ),
            (
                "python -m tools.bench step --device cpu --shape tiny --micro-batch 1 --steps 1 --variants strict "
                "--out {out}/step-8b.json",
            ),
        ),
        Stage(
            "inductor",
            "five kernels beside what torch.compile makes of the same",
            60,
            (
                "python -m tools.bench kernels --device cuda --rounds 5 --only cross_entropy swiglu add_rms_norm rms_norm rotary "
                "--out {out}/kernels-inductor.json",
            ),
            (
                "python -m tools.bench kernels --size tiny --threads 1 --no-compile --rounds 1 --only swiglu "
                "--out {out}/kernels-inductor.json",
            ),
        ),
        Stage(
            "memcheck",
            "compute-sanitizer's memcheck over the kernels' tests, with the time that is left",
            LIMIT,
            # Without torch's cache each tensor is an allocation of its own: beside it lies no other one's memory.
            (
                "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 77 "
                f'python -m pytest tests/ops -k "cuda and bf16 and not compile" -x {_TESTS}',
            ),
            (f'python -m pytest tests/ops/test_rope.py -k "cpu and bf16" -x {_TESTS}',),
            needs="compute-sanitizer",
        ),
    ),
}
"""Call -> its stages, in order; BUILD runs beside the first that need no extension."""
