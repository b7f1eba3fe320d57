"""Rotary settings of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megalm.config import ModelConfig, RopeScalingConfig
from megalm.config.errors import ConfigError
from megalm.convert.families.family import Config, Json

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def make_rope_reader(
    *, theta: float = 10000.0, fraction: float | None = None, layers: bool = False, local_theta: float | None = None
) -> Callable[[Config, ModelConfig], None]:
    """Make a reader of rotary settings.

    theta, local_theta: transformers' defaults for this family.
    fraction: the share of a head that is rotated where the config does not say; None: whole heads always.
    layers: layers with a window have settings of their own, and are not stretched by `rope_scaling`.
    """

    def read(json: Config, model: ModelConfig) -> None:
        settings = _settings(json)
        local = Config({})
        if layers:
            model.window_rope_scaling = False
            if settings.get("full_attention") is not None or settings.get("sliding_attention") is not None:
                local = settings.get("sliding_attention") or Config({})
                settings = settings.get("full_attention") or Config({})
            if (local.get("rope_type") or "default") != "default":
                raise ConfigError(
                    f"config.json: rope scaling {local['rope_type']!r} of sliding_attention is not supported; layers with a "
                    "window are not stretched here"
                )
            base = local.get("rope_theta") or json.get("rope_local_base_freq") or local_theta
            model.window_rope_theta = None if base is None else float(base)
        _read_into(json, settings, model, theta, fraction)
        if model.window_rope_theta == model.rope_theta:
            model.window_rope_theta = None

    return read


def _settings(json: Config) -> Config:
    scaling, parameters = json.get("rope_scaling"), json.get("rope_parameters")
    if scaling and parameters and any(parameters.get(key) != scaling[key] for key in scaling):
        raise ConfigError(
            f"config.json: rope_scaling={dict(scaling)} and rope_parameters={dict(parameters)} disagree; leave one of them out"
        )
    return parameters or scaling or Config({})


def _read_into(json: Config, settings: Config, model: ModelConfig, theta: float, fraction: float | None) -> None:
    def look(key: str, *others: str) -> Any:
        values = [settings.get(key), *(json.get(other) for other in (key, *others))]
        return next((value for value in values if value is not None), None)

    model.position = "rope"
    model.rope_theta = float(look("rope_theta", "rotary_emb_base") or theta)
    model.rope_fraction = float(look("partial_rotary_factor", "rotary_pct") or fraction or 1.0)
    if fraction is None and model.rope_fraction != 1.0:
        raise ConfigError(
            f"config.json: partial_rotary_factor={model.rope_fraction} is not supported for {json['model_type']}, which rotates "
            "whole heads"
        )
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "su":  # what Phi-3's first configs call it
        kind = "longrope"
    if kind not in _KINDS:
        raise ConfigError(f"config.json: rope scaling {kind!r} is not supported; supported are {', '.join(_KINDS)}")
    model.rope_scaling = _scaling(json, settings, model, kind)


def _scaling(json: Config, settings: Config, model: ModelConfig, kind: str) -> RopeScalingConfig:
    def need(key: str) -> float:
        value = settings.get(key)
        if value is None:
            raise ConfigError(f"config.json: rope scaling {kind!r} needs {key!r}, which is missing")
        return float(value)

    given = settings.get("original_max_position_embeddings")  # said by some, without effect on the first kinds
    original = int(given or json.get("original_max_position_embeddings") or model.seq_length)
    if kind == "default":
        return RopeScalingConfig()
    if kind == "linear":
        return RopeScalingConfig(kind=kind, factor=need("factor"))
    if kind == "dynamic":
        return RopeScalingConfig(kind=kind, factor=need("factor"), original_seq_length=model.seq_length)
    if kind == "llama3":
        return RopeScalingConfig(
            kind=kind,
            factor=need("factor"),
            low_frequency_factor=need("low_freq_factor"),
            high_frequency_factor=need("high_freq_factor"),
            original_seq_length=original,
        )
    if kind == "yarn":
        factor = float(settings.get("factor") or model.seq_length / original)
        return RopeScalingConfig(
            kind=kind,
            factor=factor,
            original_seq_length=original,
            beta_fast=float(settings.get("beta_fast") or 32.0),
            beta_slow=float(settings.get("beta_slow") or 1.0),
            truncate=bool(settings.get("truncate", True)),
            attention_factor=_yarn_magnitude(settings, factor),
        )
    factor = float(settings.get("factor") or model.seq_length / original)
    if json.get("original_max_position_embeddings"):
        factor = model.seq_length / original
    magnitude = settings.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    lists = {name: [float(x) for x in settings.get(name) or ()] for name in ("short_factor", "long_factor")}
    wanted = int((model.head_dim or 0) * model.rope_fraction) // 2
    for name, values in lists.items():
        if len(values) != wanted:
            raise ConfigError(
                f"config.json: {name} has {len(values)} numbers; one for each rotated pair is needed, {wanted}"
            )
    return RopeScalingConfig(
        kind=kind,
        factor=factor,
        original_seq_length=original,
        attention_factor=float(magnitude),
        short_factors=lists["short_factor"],
        long_factors=lists["long_factor"],
    )


def _yarn_magnitude(settings: Config, factor: float) -> float:
    given, over, under = (settings.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    if over and under:
        return compute_yarn_magnitude(factor, over) / compute_yarn_magnitude(factor, under)
    return compute_yarn_magnitude(factor)


def compute_yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """Compute what YaRN multiplies queries and keys by (arXiv:2309.00071, sec. 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_scaling(model: ModelConfig) -> Json | None:
    """Write what stretches the frequencies; None: nothing does."""
    scaling = model.rope_scaling
    written: Json = {"rope_type": scaling.kind, "factor": scaling.factor}
    original = {"original_max_position_embeddings": scaling.original_seq_length}
    if scaling.kind == "none":
        return None
    if scaling.kind == "llama3":
        return {
            **written,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            **original,
        }
    if scaling.kind == "yarn":
        return {
            **written,
            **original,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
            "attention_factor": scaling.attention_factor,
        }
    if scaling.kind == "longrope":
        return {
            **written,
            **original,
            "attention_factor": scaling.attention_factor,
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
        }
    return written


def write_rope(model: ModelConfig) -> Json:
    """Write the keys that every transformers since 4.43 reads."""
    return {"rope_theta": model.rope_theta, "rope_scaling": write_scaling(model)}


def write_partial_rope(model: ModelConfig) -> Json:
    """The same where a part of each head may be rotated."""
    return {**write_rope(model), "partial_rotary_factor": model.rope_fraction}


def write_layers_rope(model: ModelConfig) -> Json:
    """Write the rotations of layers with and without a window, as transformers 5 reads them."""
    full = {"rope_theta": model.rope_theta, **(write_scaling(model) or {"rope_type": "default"})}
    local = {"rope_theta": model.window_rope_theta or model.rope_theta, "rope_type": "default"}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
