"""The models of conf/model: their sizes, and which of them fit a machine."""

from dataclasses import dataclass, replace
from functools import lru_cache

from megalm.architecture.shape import resolve_shape
from megalm.architecture.tensors import count_parameters
from megalm.config import ConfigError, ModelConfig, MoEConfig
from megalm.config.cluster import CONF
from megalm.config.model_file import read_model_file
from megalm.config.typed import Kind, build
from megalm.plan.layout import Layout
from megalm.plan.machine import Machine
from megalm.plan.memory import estimate_layout


@dataclass(frozen=True)
class ModelRow:
    """One model of conf/model against a machine."""

    name: str
    parameters: int
    active_parameters: int
    bytes_needed: float
    """Of the fullest rank, with the most frugal layout (micro-batch 1, everything recomputed and split)."""
    fits: bool


@lru_cache(maxsize=1)
def list_models() -> dict[str, ModelConfig]:
    """List every model of conf/model by name, smallest first."""
    found = {}
    for path in sorted((CONF / "model").glob("*.yaml")):
        found[path.stem] = read_model(path.stem)
    return dict(sorted(found.items(), key=lambda item: count_parameters(item[1]).total))


def read_model(name: str) -> ModelConfig:
    """Read a model of conf/model, without composing a whole configuration."""
    path = CONF / "model" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (CONF / "model").glob("*.yaml")))
        raise ConfigError(f"model={name}: there is no such model. Choices: {known}.")
    model: ModelConfig = build(Kind(ModelConfig), read_model_file(path), "model")
    model.fill_in()
    return model


def choose_frugal_layout(machine: Machine, dtype: str | None = None, model: ModelConfig | None = None) -> Layout:
    """Choose the layout of a machine that needs least memory: one sequence a rank, everything recomputed and split."""
    chosen = dtype or ("fp32" if machine.is_cpu else "bf16")
    context = 1
    return Layout(
        data=machine.gpus // context,
        zero_stage=2,
        fully_shard=not machine.is_cpu and machine.gpus > 1,
        recompute="full",
        micro_batch=1,
        global_batch=machine.gpus,
        dtype=chosen,
    )


def measure_fit(model: ModelConfig, machine: Machine, dtype: str | None = None) -> tuple[bool, float]:
    """(whether a model fits with the most frugal layout, bytes of its fullest rank)."""
    needed = estimate_layout(model, choose_frugal_layout(machine, dtype, model), cpu=machine.is_cpu).bytes_per_gpu
    return needed <= machine.memory, needed


def tabulate_models(machine: Machine) -> list[ModelRow]:
    """Tabulate every model of conf/model, smallest first, with whether it can be trained on the machine."""
    rows = []
    for name, model in list_models().items():
        counts = count_parameters(model)
        possible, needed = measure_fit(model, machine)
        rows.append(ModelRow(name, counts.total, counts.active, needed, possible))
    return rows


def find_largest_fitting(machine: Machine, dtype: str | None = None) -> str | None:
    """Name of the largest model of conf/model that fits a machine."""
    fitting = [name for name, model in list_models().items() if measure_fit(model, machine, dtype)[0]]
    return fitting[-1] if fitting else None


def scale_model(parameters_wanted: float, like: ModelConfig | None = None) -> ModelConfig:
    """A model of about as many parameters, with Llama's proportions: width 128 a layer up to 64 layers deep.

    Source of the proportions: the published shapes from 125M to 70B (width over depth rises from 64 to 128).
    """
    base = like or read_model("llama3-8b")
    best: ModelConfig | None = None
    for layers in range(2, 129, 2):
        for width in range(64, 16385, 64):
            if not 40 <= width / layers <= 160 or width % _head(width):
                continue
            candidate = _shape(base, layers, width)
            if best is None or _misses(candidate, parameters_wanted) < _misses(best, parameters_wanted):
                best = candidate
    assert best is not None
    return best


def _shape(base: ModelConfig, layers: int, width: int) -> ModelConfig:
    head = _head(width)
    heads = max(1, width // head)
    group = base.num_heads // resolve_shape(base).num_kv_heads
    model = replace(
        base,
        name=f"{layers}x{width}",
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads // group if heads % group == 0 else heads,
        head_dim=head,
        ffn_hidden_size=_ffn(base, width),
        moe=MoEConfig(),
    )
    model.fill_in()
    return model


def _head(width: int) -> int:
    """Width of one head: 64 in small models, 128 from 2,048 on (as in the published shapes)."""
    return 64 if width < 2048 else 128


def _ffn(base: ModelConfig, width: int) -> int:
    return max(64, round(resolve_shape(base).ffn_hidden_size / base.hidden_size * width / 64) * 64)


def estimate_parameters(model: ModelConfig) -> float:
    """Estimate parameters in closed form, without listing tensors (biases and norms left out)."""
    shape = resolve_shape(model)
    hidden, heads = shape.hidden_size, 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    layer = hidden * (heads + (3 if model.gated else 2) * shape.ffn_hidden_size)
    embeddings = 1 if model.tie_embeddings else 2
    return model.num_layers * layer + embeddings * model.vocab_size * hidden


def _misses(model: ModelConfig, wanted: float) -> float:
    miss = abs(estimate_parameters(model) / wanted - 1)
    aspect = model.hidden_size / model.num_layers
    ideal = 64 if wanted < 1e9 else 100
    return miss + 0.02 * abs(aspect / ideal - 1)
