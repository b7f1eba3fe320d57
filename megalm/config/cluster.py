"""The machines a run can be planned for: hardware figures with their sources, and prices, all in yaml that users edit."""

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megalm.config.errors import ConfigError
from megalm.config.fields import number
from megalm.config.ranges import check_fields
from megalm.config.typed import Kind, build
from megalm.config.yaml_text import read_yaml_file

_PACKAGE = Path(__file__).resolve().parent.parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The folder of the yaml groups: inside the package when installed, beside it in a source tree."""

THIS_MACHINE = ("this", "this-machine", "cpu")
"""Names that mean the machine the command runs on, measured."""


@dataclass
class ClusterConfig:
    """Hardware of the planner; `cluster=h100` takes conf/cluster/h100.yaml, `cluster.gpu=h100` looks the same file up.

    Rates are one GPU's, one direction, in SI units; None: from the file named by `gpu`, or measured on this machine.
    """

    gpu: str | None = None
    """Name of the accelerator: a file of conf/cluster; None: this machine."""
    gpus: int | None = number(None, at_least=1)
    """GPUs to plan for; None: the ranks that the run starts."""
    aliases: list[str] | None = None
    """Other names that mean this accelerator."""
    description: str | None = None
    """What it is, in words."""
    memory_gib: float | None = number(None, above=0)
    """Memory that a program can allocate, in GiB."""
    peak_tflops: dict[str, float] | None = number(None, above=0)
    """Dense matrix rate by dtype (bf16, fp16, fp8, tf32, fp32), TFLOP/s."""
    memory_tb_per_s: float | None = number(None, above=0)
    """Memory bandwidth, TB/s."""
    processors: int | None = number(None, at_least=1)
    """Streaming multiprocessors or compute units: sets how a small product fills the chip."""
    gpus_per_node: int | None = number(None, at_least=1)
    """GPUs that the fast link joins."""
    link_gb_per_s: float | None = number(None, above=0)
    """Bandwidth to the GPUs of the same node, GB/s."""
    link_latency_us: float | None = number(None, at_least=0)
    """Latency of one step of a collective inside a node, microseconds."""
    network_gb_per_s: float | None = number(None, above=0)
    """Bandwidth to other nodes, GB/s of each GPU."""
    network_latency_us: float | None = number(None, at_least=0)
    """Latency of one step of a collective between nodes, microseconds."""
    host_gb_per_s: float | None = number(None, above=0)
    """Bandwidth to host memory, GB/s."""
    matmul_efficiency: float | None = number(None, above=0, at_most=1)
    """Share of the peak that a large matrix product reaches in a training step."""
    attention_efficiency: dict[str, float] | None = number(None, above=0, at_most=1)
    """Share of the peak of the attention kernel's own work, forward and backward."""
    memory_efficiency: float | None = number(None, above=0, at_most=1)
    """Share of the memory bandwidth that elementwise kernels reach."""
    link_efficiency: float | None = number(None, above=0, at_most=1)
    """Share of the link's bandwidth that collectives reach."""
    network_efficiency: float | None = number(None, above=0, at_most=1)
    """Share of the network's bandwidth that collectives reach."""
    launch_us: float | None = number(None, at_least=0)
    """Time that one kernel costs at least, microseconds."""
    watts: float | None = number(None, at_least=0)
    """Power limit of one GPU."""
    price: float | None = number(None, at_least=0)
    """Dollars a GPU-hour; None: from conf/prices.yaml."""
    failures_per_1000_gpu_days: float | None = number(None, at_least=0)
    """Unexpected interruptions; None: conf/prices.yaml's default rate."""
    sources: dict[str, str] | None = None
    """Where each figure comes from."""


@dataclass(frozen=True)
class Accelerator:
    """One accelerator and its links, in plain SI units (FLOP/s, bytes, bytes/s, seconds)."""

    name: str
    description: str
    memory: float
    peak: dict[str, float]
    memory_bandwidth: float
    processors: int
    gpus_per_node: int
    link_bandwidth: float
    link_latency: float
    network_bandwidth: float
    network_latency: float
    host_bandwidth: float
    matmul_efficiency: float
    attention_efficiency: dict[str, float]
    memory_efficiency: float
    link_efficiency: float
    network_efficiency: float
    launch: float
    watts: float
    sources: dict[str, str] = field(default_factory=dict)

    def peak_of(self, dtype: str) -> float:
        """Dense matrix rate in FLOP/s for a dtype; ConfigError when the chip has none for it."""
        if dtype not in self.peak:
            raise ConfigError(
                f"{self.name} has no figure for dtype {dtype!r}; it has {', '.join(sorted(self.peak))}."
                f" Choose one of these, or add the figure to conf/cluster/{self.name}.yaml."
            )
        return self.peak[dtype]


def make_accelerator(config: ClusterConfig) -> Accelerator:
    """Turn a filled-in record into an Accelerator; ConfigError names the missing figures."""
    needed = [f.name for f in fields(config) if f.name not in _OPTIONAL]
    missing = [name for name in needed if getattr(config, name) is None]
    if missing:
        raise ConfigError(
            f"cluster {config.gpu!r} lacks {', '.join(missing)}: every accelerator needs these figures."
            f" Add them to conf/cluster/{config.gpu}.yaml, or start from a copy of conf/cluster/h100.yaml."
        )
    value: Any = config
    return Accelerator(
        name=value.gpu,
        description=value.description,
        memory=value.memory_gib * 2**30,
        peak={dtype: rate * 1e12 for dtype, rate in value.peak_tflops.items()},
        memory_bandwidth=value.memory_tb_per_s * 1e12,
        processors=value.processors,
        gpus_per_node=value.gpus_per_node,
        link_bandwidth=value.link_gb_per_s * 1e9,
        link_latency=value.link_latency_us * 1e-6,
        network_bandwidth=value.network_gb_per_s * 1e9,
        network_latency=value.network_latency_us * 1e-6,
        host_bandwidth=value.host_gb_per_s * 1e9,
        matmul_efficiency=value.matmul_efficiency,
        attention_efficiency=dict(value.attention_efficiency),
        memory_efficiency=value.memory_efficiency,
        link_efficiency=value.link_efficiency,
        network_efficiency=value.network_efficiency,
        launch=value.launch_us * 1e-6,
        watts=value.watts,
        sources=dict(value.sources or {}),
    )


_OPTIONAL = ("gpus", "aliases", "price", "failures_per_1000_gpu_days", "sources")


@lru_cache(maxsize=1)
def read_hardware() -> dict[str, ClusterConfig]:
    """Read every record of conf/cluster by name."""
    records = {}
    for path in sorted((CONF / "cluster").glob("*.yaml")):
        entries = read_yaml_file(path, str(path)) or {}
        if entries.get("gpu") is None:
            continue
        try:
            record = build(Kind(ClusterConfig), entries)
            check_fields(record, "cluster.")
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        records[record.gpu] = record
    return records


def find_accelerator(name: str, overrides: ClusterConfig | None = None) -> Accelerator:
    """Find the accelerator called `name` (any spelling of case, `_` and `-`, or an alias), with a config's own figures."""
    wanted = _spelling(name)
    for record in read_hardware().values():
        if wanted in [_spelling(known) for known in (record.gpu, *(record.aliases or []))]:
            return make_accelerator(_overlay(record, overrides))
    if overrides is not None and all(
        getattr(overrides, f.name) is not None for f in fields(overrides) if f.name not in _OPTIONAL
    ):
        return make_accelerator(overrides)
    raise ConfigError(
        f"unknown GPU {name!r}; known are {', '.join(sorted(read_hardware()))} and cpu (this machine)."
        " Choose one, or describe yours in a new conf/cluster/NAME.yaml."
    )


def _overlay(record: ClusterConfig, overrides: ClusterConfig | None) -> ClusterConfig:
    if overrides is None:
        return record
    given = {f.name: getattr(overrides, f.name) for f in fields(overrides) if f.name not in ("gpu", "gpus")}
    return replace(record, **{name: value for name, value in given.items() if value is not None})


def _spelling(name: str | None) -> str:
    return str(name or "").lower().replace("_", "-").replace(" ", "-")


@lru_cache(maxsize=1)
def read_prices() -> dict[str, Any]:
    """conf/prices.yaml: GPU-hours, storage, human-made data and failure rates, each with date and source."""
    path = CONF / "prices.yaml"
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing: the prices that the planner works with. Restore it from the repository."
        ) from None
