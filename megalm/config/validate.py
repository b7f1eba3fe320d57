"""Checks that look at several fields at once. What depends on the machine is checked by the launcher."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from megalm.config.changes import check_allowed_keys
from megalm.config.errors import ConfigError
from megalm.config.guard import check_guard
from megalm.config.model import ModelConfig
from megalm.config.phases import spans_of
from megalm.config.root import Config
from megalm.config.train import TrainConfig


def validate(config: Config) -> None:
    """Raise ConfigError for the first value, or pair of values, that cannot work."""
    for path, value, choices in _choices(config):
        if value not in choices:
            raise ConfigError(f"{path}={value}: not one of {', '.join(choices)}.")
    _check_model(config.model)
    _check_train(config.train)
    _check_ranges(config)
    check_guard(config.guard)
    _check_phases(config)
    check_allowed_keys(config)


def _check_phases(config: Config) -> None:
    spans_of(config)
    _require(
        not config.data.phases or config.data.order == "keyed",
        f"data.phases needs data.order=keyed: data.order={config.data.order} fixes one order for the whole run.",
    )
    _require(
        config.data.packing != "best_fit" or config.data.order == "keyed",
        f"data.packing=best_fit needs data.order=keyed: data.order={config.data.order} cuts samples in its own way.",
    )
    short = next((p for p in config.data.phases if p.seq_length not in (None, config.model.seq_length)), None)
    _require(
        config.data.packing != "best_fit" or short is None,
        "data.packing=best_fit packs samples of model.seq_length: leave seq_length out of data.phases.",
    )
    window = config.data.shuffle_window
    _require(window >= 0, f"data.shuffle_window={window}: a number of samples, or 0 to shuffle whole sources.")
    for name in ("fim_rate", "fim_spm_rate"):
        value = getattr(config.data, name)
        _require(0 <= value <= 1, f"data.{name}={value}: a probability, from 0 to 1.")


def _choices(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from _choices(value, f"{prefix}{f.name}.")
        elif "choices" in f.metadata:
            yield f"{prefix}{f.name}", value, f.metadata["choices"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_model(model: ModelConfig) -> None:
    assert model.num_kv_heads is not None and model.head_dim is not None and model.ffn_hidden_size is not None
    for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "vocab_size"):
        value = getattr(model, name)
        _require(value > 0, f"model.{name}={value}: must be positive.")
    _require(model.seq_length > 0, f"model.seq_length={model.seq_length}: must be positive.")
    if model.head_dim * model.num_heads != model.hidden_size and model.hidden_size % model.num_heads:
        near = [h for h in range(1, model.hidden_size + 1) if model.hidden_size % h == 0]
        near = sorted(sorted(near, key=lambda h: abs(h - model.num_heads))[:4])
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads={model.num_heads}. "
            f"Numbers of heads near it that divide: {', '.join(map(str, near))}; or set model.head_dim."
        )
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}: "
        "each key/value head serves the same number of query heads.",
    )
    _require(
        model.position != "rope" or int(model.head_dim * model.rope_fraction) % 2 == 0,
        f"model.position=rope rotates pairs: head_dim {model.head_dim} x rope_fraction {model.rope_fraction} is odd.",
    )
    _require(0.0 <= model.dropout < 1.0, f"model.dropout={model.dropout}: must be at least 0 and below 1.")
    _require(
        not (model.parallel_residual and model.norm_placement == "post"),
        "model.parallel_residual=true needs model.norm_placement=pre: both sub-layers read the same normalised input.",
    )
    _require(
        model.moe.num_experts == 0,
        f"model.moe.num_experts={model.moe.num_experts}: training mixtures of experts is not offered yet; "
        "the planner (python -m tools.plan) counts them. Set model.moe.num_experts=0.",
    )


def _check_train(train: TrainConfig) -> None:
    for name in ("steps", "tokens", "micro_batch_size", "global_batch_size"):
        value = getattr(train, name)
        _require(value is None or value > 0, f"train.{name}={value}: must be positive.")
    for name in ("log_every", "eval_every", "eval_sequences", "sample_tokens"):
        value = getattr(train, name)
        _require(value >= 0, f"train.{name}={value}: must not be negative.")


def _check_ranges(config: Config) -> None:
    optim = config.optim
    _require(optim.lr > 0, f"optim.lr={optim.lr}: must be positive.")
    _require(0 <= optim.min_lr <= optim.lr, f"optim.min_lr={optim.min_lr}: must lie between 0 and optim.lr={optim.lr}.")
    _require(optim.warmup_steps >= 0, f"optim.warmup_steps={optim.warmup_steps}: must not be negative.")
    _require(
        len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas),
        f"optim.betas={list(optim.betas)}: two numbers, each at least 0 and below 1.",
    )
    _require(optim.clip_grad_norm >= 0, f"optim.clip_grad_norm={optim.clip_grad_norm}: 0 (never clip) or positive.")
    _check_prevention(config)
    _require(
        0 < optim.decay_fraction <= 1, f"optim.decay_fraction={optim.decay_fraction}: must be above 0 and at most 1."
    )
    _require(0 <= config.data.holdout < 1, f"data.holdout={config.data.holdout}: must be at least 0 and below 1.")
    for name in ("every", "keep", "keep_every"):
        value = getattr(config.checkpoint, name)
        _require(value >= 0, f"checkpoint.{name}={value}: must not be negative.")
    _require(
        config.checkpoint.load == "all" or config.checkpoint.load_path is not None,
        "checkpoint.load=weights needs checkpoint.load_path=FOLDER: the weights to start from.",
    )
    _require(
        config.world_size is None or config.world_size > 0,
        f"world_size={config.world_size}: the number of local ranks must be positive.",
    )


def _check_prevention(config: Config) -> None:
    """What keeps a run from diverging."""
    optim, clip = config.optim, config.optim.adaptive_clip
    for name in ("qk_clip", "reset_every", "reset_warmup_steps"):
        value = getattr(optim, name)
        _require(value >= 0, f"optim.{name}={value}: 0 (never) or positive.")
    _require(
        not (optim.qk_clip and config.model.qk_norm),
        f"optim.qk_clip={optim.qk_clip} and model.qk_norm=true: the norm makes the size of query and key weights "
        "irrelevant, so scaling them bounds nothing. Choose one of the two.",
    )
    _require(
        not optim.reset_every or optim.reset_every > optim.reset_warmup_steps,
        f"optim.reset_every={optim.reset_every} is not above optim.reset_warmup_steps={optim.reset_warmup_steps}: the "
        "learning rate would never come back.",
    )
    if clip.kind == "none":
        return
    _require(
        clip.threshold > 0 and 0 < clip.decay < 1 and clip.warmup_steps > 1,
        f"optim.adaptive_clip: threshold={clip.threshold} must be positive, decay={clip.decay} between 0 and 1, "
        f"warmup_steps={clip.warmup_steps} at least 2.",
    )
