"""A scaling ladder: small models of the target's proportions, with tokens and learning rates, as experiments."""

from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from megalm.architecture.tensors import count_parameters
from megalm.config import ConfigError, ModelConfig
from megalm.plan.models import scale_model

LEARNING_RATES = (
    (125e6, 6.0e-4), (350e6, 3.0e-4), (760e6, 2.5e-4), (1.3e9, 2.0e-4), (2.7e9, 1.6e-4), (6.7e9, 1.2e-4), (13e9, 1.0e-4),
    (175e9, 0.6e-4),
)  # fmt: skip
"""(parameters, peak learning rate) of GPT-3 (Brown et al. 2020, table 2.1)."""
BATCHES = ((125e6, 0.5e6), (760e6, 0.5e6), (1.3e9, 1e6), (2.7e9, 1e6), (6.7e9, 2e6), (13e9, 2e6), (175e9, 3.2e6))
"""(parameters, tokens of a batch) of the same table."""
SMALLEST_STEPS = 1000
"""A rung's batch is no larger than its tokens over this: fewer updates do not settle."""


@dataclass(frozen=True)
class Rung:
    """One size of the ladder."""

    name: str
    model: ModelConfig
    parameters: int
    tokens: float
    lr: float
    global_batch: int

    @property
    def steps(self) -> int:
        """Updates."""
        return max(1, round(self.tokens / (self.global_batch * self.model.seq_length)))

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6.0 * self.parameters * self.tokens


def interpolate(table: tuple[tuple[float, float], ...], at: float) -> float:
    """Linear in log-log between a table's points, its end slopes beyond them."""
    points = [(log(x), log(y)) for x, y in table]
    index = next((i for i in range(1, len(points)) if log(at) <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return exp(y0 + (y1 - y0) * (log(at) - x0) / (x1 - x0))


def interpolate_learning_rate(size: float) -> float:
    """Peak learning rate of GPT-3's table at a size; never above 1e-3, where small models of its kind turn unstable."""
    return min(1e-3, interpolate(LEARNING_RATES, size))


def build_ladder(target: ModelConfig, rungs: int = 5, ratio: float = 20.0) -> list[Rung]:
    """`rungs` models below the target and the target itself, evenly spaced in the logarithm of size.

    The smallest is 1/1000 of the target, but no smaller than 10M parameters.
    """
    if rungs < 1:
        raise ConfigError(f"rungs={rungs}: at least 1.")
    whole = count_parameters(target)
    size = float(whole.total)
    least = max(1e7, size / 1000)
    if least * 2 > size:
        raise ConfigError(
            f"{target.name} has {whole.total:,} parameters: too small for a ladder below it,"
            " which starts at 10M. Choose a larger model."
        )
    answers = []
    for index in range(rungs):
        wanted = least * (size / least) ** (index / rungs)
        model = scale_model(wanted, target)
        model.name = f"{target.name}-ladder-{index + 1}"
        answers.append(_rung(model.name, model, ratio))
    answers.append(_rung(target.name, target, ratio))
    return answers


def _rung(name: str, model: ModelConfig, ratio: float) -> Rung:
    counts = count_parameters(model)
    tokens = ratio * counts.active
    batch = min(interpolate(BATCHES, counts.active), tokens / SMALLEST_STEPS, 4e6)
    sequences = 2 ** max(0, round(log(max(1.0, batch / model.seq_length), 2)))
    return Rung(name, model, counts.total, tokens, interpolate_learning_rate(counts.active), sequences)


def write_experiment_yaml(rung: Rung, note: str) -> str:
    """A file of conf/experiment: `python -m megalm.launch +experiment=...` runs the rung."""
    model = rung.model
    keys = (
        "name", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "vocab_size",
        "seq_length", "norm", "norm_eps", "norm_bias", "norm_placement", "activation", "position", "rope_theta",
        "linear_bias", "qkv_bias", "attention_out_bias", "parallel_residual", "qk_norm", "qk_norm_scope",
        "tie_embeddings",
    )  # fmt: skip
    lines = ["# @package _global_", f"# {note}", "model:"]
    lines += [f"  {key}: {_scalar(getattr(model, key))}" for key in keys]
    warm_up = max(10, min(2000, rung.steps // 100))
    lines += [
        "train:",
        f"  steps: {rung.steps}",
        f"  global_batch_size: {rung.global_batch}",
        f"  micro_batch_size: {min(8, rung.global_batch)}",
        "optim:",
        f"  lr: {rung.lr:.3g}",
        "  min_lr_ratio: 0.1",
        f"  warmup_steps: {warm_up}",
        "run:",
        f"  name: {rung.name}",
    ]
    return "\n".join(lines) + "\n"


def write(rungs: list[Rung], folder: Path) -> list[Path]:
    """Write one experiment a rung into a folder; returns the files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for rung in rungs:
            file = folder / f"{rung.name}.yaml"
            note = f"{rung.parameters:,} parameters on {rung.tokens:.3g} tokens: a rung of a scaling ladder."
            file.write_text(write_experiment_yaml(rung, note), encoding="utf-8")
            written.append(file)
        return written
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be written ({error.strerror}).") from None


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and value < 1e-3 else str(value)
