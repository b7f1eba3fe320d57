"""The machine to plan for: one named in conf/cluster, or this one, measured once and remembered."""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from megalm.config import Config, ConfigError, PrecisionConfig
from megalm.config.cluster import THIS_MACHINE, Accelerator, ClusterConfig, find_accelerator, read_hardware, read_prices

REMEMBERED = 86400.0
"""Seconds after which this machine is measured again: it may have been busy the first time."""
CPU_BF16_RATIO = 0.53
"""bf16 over fp32 matrix rate of a CPU without bf16 tiles: 84 of 157 GFLOP/s a core were measured (AVX-512)."""


@dataclass(frozen=True)
class Machine:
    """Accelerators of one kind with what is around them."""

    accelerator: Accelerator
    gpus: int
    """Accelerators; on a CPU the ranks that share it."""
    cores: int = 0
    """Processor cores of this machine; 0 for a machine that is only planned for."""
    host_memory: float = 0.0
    """Bytes of host memory of this machine; 0 when unknown."""
    price: float | None = None
    """Dollars an accelerator-hour; None when nothing is known (this machine)."""
    price_source: str = ""
    failures_per_1000_gpu_days: float = 1.0
    failures_source: str = ""

    @property
    def is_cpu(self) -> bool:
        """Whether the ranks share this machine's processor."""
        return self.accelerator.name == "cpu"

    @property
    def memory(self) -> float:
        """Bytes that one rank may use."""
        return self.accelerator.memory / self.gpus if self.is_cpu else self.accelerator.memory

    def peak(self, dtype: str) -> float:
        """FLOP/s of one rank's matrix products in `dtype`."""
        rate = self.accelerator.peak_of(dtype)
        return rate / self.gpus if self.is_cpu else rate

    def with_gpus(self, gpus: int) -> "Machine":
        """The same machine with another number of ranks."""
        return replace(self, gpus=gpus)

    def describe(self) -> str:
        """One line: what it is."""
        chip = self.accelerator
        if self.is_cpu:
            return (
                f"{self.gpus} rank{'s' * (self.gpus > 1)} on {self.cores} CPU cores"
                f" ({chip.peak['fp32'] / 1e9:.0f} GFLOP/s fp32 measured, {chip.memory / 2**30:.0f} GiB)"
            )
        return f"{self.gpus} x {chip.description} ({chip.peak['bf16'] / 1e12:.0f} TFLOP/s bf16)"

    def as_dict(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


def make_planned_machine(
    gpu: str,
    gpus: int,
    *,
    price: float | None = None,
    price_list: str | None = None,
    overrides: ClusterConfig | None = None,
) -> Machine:
    """A machine of `gpus` accelerators called `gpu`, with its price and failure rate from conf/prices.yaml."""
    if gpus < 1:
        raise ConfigError(f"gpus={gpus}: at least one GPU is needed.")
    if gpu.lower() in THIS_MACHINE:
        return measure_this_machine().with_gpus(gpus)
    accelerator = find_accelerator(gpu, overrides)
    given = price if price is not None else overrides.price if overrides else None
    dollars, source = find_gpu_hour_price(accelerator.name, price_list) if given is None else (given, "given")
    rate = overrides.failures_per_1000_gpu_days if overrides else None
    failures, why = find_failure_rate() if rate is None else (rate, "given")
    return Machine(
        accelerator, gpus, price=dollars, price_source=source, failures_per_1000_gpu_days=failures, failures_source=why
    )


def find_gpu_hour_price(name: str, price_list: str | None = None) -> tuple[float | None, str]:
    """(dollars a GPU-hour, 'source, date') from conf/prices.yaml; (None, reason) when the list lacks the GPU."""
    table = read_prices()["gpu_hour"]
    chosen = price_list or table["default"]
    if chosen not in table["lists"]:
        raise ConfigError(f"price_list={chosen}: conf/prices.yaml has {', '.join(table['lists'])}.")
    entry = table["lists"][chosen].get(name)
    if entry is None:
        return None, f"no price of {name} in conf/prices.yaml"
    return float(entry["price"]), f"{entry['source']} ({entry['date']})"


def find_failure_rate(name: str | None = None) -> tuple[float, str]:
    """(failures in 1,000 GPU-days, source) of one of the named rates in conf/prices.yaml."""
    table = read_prices()["failures"]
    chosen = name or table["default"]
    if chosen not in table["rates"]:
        raise ConfigError(f"failures={chosen}: give a number per 1,000 GPU-days or one of {', '.join(table['rates'])}.")
    entry = table["rates"][chosen]
    return float(entry["per_1000_gpu_days"]), f"{entry['source']}"


def find_machine(config: Config, gpus: int | None = None) -> Machine:
    """Find the machine that a configuration is planned for: its cluster, or else this machine."""
    cluster = config.cluster
    count = gpus or cluster.gpus or config.world_size or _world_from_environment()
    if cluster.gpu and cluster.gpu.lower() not in THIS_MACHINE:
        return make_planned_machine(cluster.gpu, count or 1, price=cluster.price, overrides=cluster)
    machine = measure_this_machine(gpu=False if config.device == "cpu" else None)
    return machine.with_gpus(count) if count else machine


def resolve_precision(config: Config, machine: Machine) -> None:
    """Where nobody gave a number format: bf16 on GPUs. What any file or word gave stays."""
    if config.precision.dtype_chosen and not machine.is_cpu:
        config.precision = PrecisionConfig(dtype="bf16", fp8=config.precision.fp8)


def _world_from_environment() -> int | None:
    value = os.environ.get("WORLD_SIZE", "")
    return int(value) if value.isdigit() else None


@lru_cache(maxsize=2)
def measure_this_machine(gpu: bool | None = None) -> Machine:
    """Measure the machine that this runs on: its GPUs if there are any (unless gpu=False), else its processor, measured."""
    cores, memory = _cores(), _host_memory()
    found = [] if gpu is False else _gpus()
    if found:
        name, count = found[0], len(found)
        accelerator = _recognise(name)
        if accelerator is not None:
            failures, why = find_failure_rate()
            return Machine(accelerator, count, cores, memory, *find_gpu_hour_price(accelerator.name), failures, why)
    measured = measure_cpu(cores)
    flops, copy = measured["fp32_flops"], measured["copy_bytes_per_s"]
    source = f"measured on this machine ({_processor()}, {cores} cores)"
    accelerator = Accelerator(
        name="cpu",
        description=_processor(),
        memory=memory,
        peak={"fp32": flops, "bf16": flops * CPU_BF16_RATIO, "fp16": flops * CPU_BF16_RATIO},
        memory_bandwidth=copy,
        processors=cores,
        gpus_per_node=1 << 30,
        link_bandwidth=1.3e9,
        link_latency=100e-6,
        network_bandwidth=1.0e9,
        network_latency=200e-6,
        host_bandwidth=copy,
        matmul_efficiency=1.0,
        attention_efficiency={"forward": 0.32, "backward": 0.32},
        memory_efficiency=0.45,
        link_efficiency=1.0,
        network_efficiency=1.0,
        launch=8e-6,
        watts=0.0,
        sources={
            "peak_tflops": f"{source}: matrix product of torch; bf16 as {CPU_BF16_RATIO} of fp32",
            "memory_tb_per_s": f"{source}: copy of 64 MiB, read and write counted",
            "link_gb_per_s": "gloo all-reduce of 4 MB between two ranks of one machine: 1.3 GB/s, 0.1 ms",
            "attention_efficiency": "scaled_dot_product_attention of torch on a CPU: 50 of 157 GFLOP/s a core",
        },
    )
    return Machine(accelerator, 1, cores, memory, None, "this machine", 0.0, "this machine")


def measure_cpu(cores: int, cache: Path | None = None) -> dict[str, float]:
    """Matrix rate and copy bandwidth of the whole processor, measured in under two seconds and kept in the user's cache.

    One process of the machine measures, the others wait for it: ranks that measured all at once would each see their
    share of the cores, and report a utilisation above 100%.
    """
    file = cache or _cache_file()
    key = f"torch|{_processor()}|{cores}"
    with _alone(file.with_suffix(".lock")):
        try:
            known = json.loads(file.read_text())
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        before = known[key] if isinstance(known.get(key), dict) else {}
        if time.time() - before.get("measured_at", 0.0) < REMEMBERED:
            return before
        measured = _measure(cores)
        # Other programs only ever slow a measurement down: the best one ever seen counts.
        known[key] = {name: max(value, before.get(name, 0.0)) for name, value in measured.items()}
        known[key]["measured_at"] = time.time()
        try:
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(known))
            temporary.replace(file)
        except OSError:
            pass  # a read-only home only means measuring again next time
        return known[key]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Inside the block no other process of this machine is in it, where the home can be written."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")  # noqa: SIM115
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _measure(cores: int) -> dict[str, float]:
    """With torch, since its matrix products are what will train (numpy may use another library), on all cores, whatever
    the number of threads that this process was started with."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        return _measure_rates()
    finally:
        torch.set_num_threads(threads)


def _measure_rates() -> dict[str, float]:
    import torch

    left = torch.full((2048, 2048), 0.5)
    result = torch.empty_like(left)
    cores = torch.get_num_threads()
    flops = _best_rate(lambda: torch.mm(left, left, out=result), 2.0 * 2048**3, cores)
    source = torch.ones(64 * 2**20 // 4)
    target = torch.ones_like(source)
    copy = _best_rate(lambda: target.copy_(source), 2.0 * source.nbytes)
    return {"fp32_flops": flops, "copy_bytes_per_s": copy}


def _best_rate(action: Any, amount: float, cores: int | None = None, seconds: float = 0.5) -> float:
    """The best of repeated runs: other programs only ever slow a run down.

    cores: those that the action keeps busy. Its time is then that of the processor, shared among them, where that is less:
    on a busy machine it waits for its turn, and a rate that waits were counted in would be no limit of anything.
    """
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start, used = time.perf_counter(), time.process_time()
        action()
        now = time.perf_counter()
        best = min(best, now - start)
        if cores:
            best = min(best, (time.process_time() - used) / cores)
        if now > end:
            return amount / best


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalm" / "machine.json"


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _host_memory() -> float:
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError, AttributeError):
        memory = 8.0 * 2**30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return memory if limit == "max" else min(memory, float(limit))
    except (OSError, ValueError):
        return memory


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Names of the GPUs: from torch when it is loaded anyway, else from nvidia-smi."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listed = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()] if listed.returncode == 0 else []


def _recognise(device: str) -> Accelerator | None:
    """The record whose name occurs in a device's name ('NVIDIA A100-SXM4-80GB' -> a100-80gb)."""
    text = device.lower().replace(" ", "-")
    for name in sorted(read_hardware(), key=len, reverse=True):
        chip, _, size = name.partition("-")
        if chip in text and (not size or size in text):
            return find_accelerator(name)
    return None
