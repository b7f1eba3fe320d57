"""Hugging Face's `config.json` <-> ModelConfig: every setting accounted for, and the architecture that fits.

Whether an architecture can express a model is not a list of conditions that could be wrong: the model's config is written
in it and read back, and must come back the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert.families import FAMILIES
from megalm.convert.families.family import Config, Family, Json
from megalm.convert.huggingface_settings import account_for


@dataclass(frozen=True)
class Reading:
    """The model of a config.json, and what a person should know of how it was read."""

    model: ModelConfig
    notes: list[str]


def widen_positions(model: ModelConfig) -> ModelConfig:
    """The model with sequences as long as it is for, as `config.json` knows it: nothing there says how it was trained."""
    limit = model.position_limit
    return dataclasses.replace(model, seq_length=limit, max_positions=limit)


def collect_function(model: ModelConfig) -> Json:
    """Collect the settings that decide the function the model computes; those without effect are left out."""
    fields = dataclasses.asdict(widen_positions(model))
    for key in ("name", "max_positions", "init_std", "scaled_init", "z_loss", "dropout"):
        fields.pop(key)
    fields.pop("rope_interleaved")  # rows are reordered on the way: see order_half_split_rows
    rotated = model.position == "rope"
    windows = model.window is not None and any(
        w.startswith("window") for w in map(model.attends, range(model.num_layers))
    )
    fields["layer_pattern"] = [_attended(model, index) for index in range(model.num_layers)]
    fields["window"] = model.window if windows else None
    fields["attention_scale"] = model.attention_scale or (model.head_dim or 1) ** -0.5
    used = _SCALING_KEYS.get(model.rope_scaling.kind, ())
    fields["rope_scaling"] = {key: value for key, value in fields["rope_scaling"].items() if key in ("kind", *used)}
    if not rotated:
        del fields["rope_theta"], fields["rope_fraction"], fields["rope_scaling"]
    if rotated and windows:
        fields["window_rope_theta"] = model.window_rope_theta or model.rope_theta
    else:
        del fields["window_rope_theta"]
    if not (rotated and windows) or model.rope_scaling.kind == "none":
        del fields["window_rope_scaling"]
    fields["prediction"] = {"depth": model.prediction.depth}
    fields["latent"] = fields["latent"] if model.latent.key_rank else None
    if model.position != "alibi":
        fields.pop("alibi_max_bias")
    if not model.qk_norm:
        fields.pop("qk_norm_scope")
    if model.norm == "rmsnorm":
        fields.pop("norm_bias")
    fields["moe"] = _mixture_of(model) if model.moe.num_experts else None
    if model.activation != "clamped_swiglu":
        del fields["activation_limit"]
    if all(model.moe.is_dense(index) for index in range(model.num_layers)):
        return fields
    if not any(model.moe.is_dense(index) for index in range(model.num_layers)):
        del fields["ffn_hidden_size"]  # of no layer
    return fields


def _mixture_of(model: ModelConfig) -> Json:
    """What decides the function of a mixture; what keeps its load even does not."""
    moe = dataclasses.asdict(model.moe)
    for key in ("bias_rate", "balance", "balance_loss", "z_loss", "num_shared_experts", "first_dense", "every"):
        moe.pop(key)
    moe["dense_layers"] = [index for index in range(model.num_layers) if model.moe.is_dense(index)]
    if model.moe.groups < 2:
        for key in ("groups", "top_groups", "group_scores"):
            moe.pop(key)
    return moe


_SCALING_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_seq_length"),
    "llama3": ("factor", "low_frequency_factor", "high_frequency_factor", "original_seq_length"),
    "yarn": ("factor", "original_seq_length", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("original_seq_length", "short_factors", "long_factors", "attention_factor"),
}
"""What decides the frequencies of each kind of stretching."""


def _attended(model: ModelConfig, index: int) -> str:
    """How a layer attends, without words that mean nothing in this model."""
    word = model.attends(index)
    return word if model.position == "rope" else word.removesuffix("_no_rope")


def list_unexpressed(model: ModelConfig, architecture: Family) -> list[str]:
    """List what the architecture cannot express of the model: `key=value` of each setting; empty if it fits."""
    try:
        back = collect_function(
            architecture.read(Config({"model_type": architecture.model_type, **_write(model, architecture)}))
        )
    except ConfigError as error:
        return [str(error)]
    ours = collect_function(model)
    return [f"model.{key}={ours[key]!r}" for key in ours if ours[key] != back.get(key)]


def choose_architecture(model: ModelConfig, preferred: str | None = None) -> Family:
    """Choose the architecture that expresses the model exactly. `preferred` (a model_type) is tried first.

    Raises ConfigError that says, for the nearest architectures, which settings stand in the way.
    """
    candidates = sorted(FAMILIES.values(), key=lambda architecture: architecture.model_type != preferred)
    obstacles = [(list_unexpressed(model, architecture), architecture) for architecture in candidates]
    for found, architecture in obstacles:
        if not found:
            return architecture
    nearest = sorted(obstacles, key=lambda pair: len(pair[0]))[:3]
    lines = "; ".join(f"{architecture.model_type} cannot express {', '.join(found)}" for found, architecture in nearest)
    raise ConfigError(
        f"no Hugging Face architecture computes what this model does: {lines}. Change these settings to export it."
    )


def read_settings(json: Json, accept: Collection[str] = ()) -> Reading:
    """Read a `config.json` into a ModelConfig, each of its settings accounted for.

    accept: settings that are not known here and may be passed over. ConfigError where the architecture or a setting of it is
    not supported, or nobody knows what a setting does.
    """
    config = Config(json, accept)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type={model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    model = FAMILIES[model_type].read(config)
    told = account_for(config, accept)
    idle = [key for key in accept if not any(f" {key}=" in note for note in (*config.notes, *told))]
    if idle:
        raise ConfigError(f"--accept {idle[0]}: config.json has no such setting that would be refused; leave it out")
    return Reading(model, config.notes + told)


def read_config(json: Json, accept: Collection[str] = ()) -> ModelConfig:
    """Read a `config.json` into a ModelConfig (see read_settings)."""
    return read_settings(json, accept).model


def write_config(model: ModelConfig, *, preferred: str | None = None) -> Json:
    """Write the model's `config.json`, but for the number format of its files."""
    architecture = choose_architecture(model, preferred)
    head = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    return {**head, **_write(model, architecture)}


def _write(model: ModelConfig, architecture: Family) -> Json:
    return architecture.write(widen_positions(model))
