"""Which settings of attention go together."""

from __future__ import annotations

from megalm.config.errors import ConfigError
from megalm.config.model import ModelConfig

LAYER_WORDS = ("full", "window", "full_no_rope", "window_no_rope")
"""What model.layer_pattern is made of."""


def check_attention(model: ModelConfig) -> None:
    """Raise ConfigError for the first of model's settings of attention that cannot work, or would have no effect."""
    for word in model.layer_pattern:
        _require(word in LAYER_WORDS, f"model.layer_pattern has {word!r}: not one of {', '.join(LAYER_WORDS)}.")
    words = {model.attends(index) for index in range(model.num_layers)}
    windows = {word for word in words if word.startswith("window")}
    _require(
        not windows or model.window is not None,
        f"model.layer_pattern={_show(model.layer_pattern)} needs model.window: the tokens that a token sees there.",
    )
    _require(
        bool(windows) or model.window is None,
        f"model.window={model.window} and model.layer_pattern={_show(model.layer_pattern)}: no layer has the window. Name it "
        "for some layers, or leave model.window out.",
    )
    rotated = model.position == "rope"
    _require(
        rotated or not any(word.endswith("_no_rope") for word in words),
        f"model.layer_pattern={_show(model.layer_pattern)} leaves rotations out, and model.position={model.position} has none: "
        "leave _no_rope out.",
    )
    for name, value, usual in (
        ("window_rope_theta", model.window_rope_theta, None),
        ("window_rope_scaling", model.window_rope_scaling, True),
    ):
        _require(
            value == usual or bool(rotated and windows),
            f"model.{name}={str(value).lower()} is for rotated layers with a window, and this model has none: leave it out.",
        )
    _require(
        not model.shared_norm or model.parallel_residual,
        "model.shared_norm=true needs model.parallel_residual=true: only there do attention and MLP read the same input.",
    )
    if model.latent.key_rank:
        _check_latent(model)
    if rotated:
        _check_stretching(model)


def _check_latent(model: ModelConfig) -> None:
    latent = model.latent
    wanted = latent.plain_dim + latent.rope_dim
    _require(
        model.head_dim == wanted,
        f"model.head_dim={model.head_dim}: with model.latent it is plain_dim + rope_dim = {wanted}. Leave it out.",
    )
    _require(
        model.num_kv_heads == model.num_heads,
        f"model.num_kv_heads={model.num_kv_heads}: with model.latent each of the model.num_heads={model.num_heads} heads has "
        "keys of its own. Leave it out.",
    )
    _require(
        model.position == "rope",
        f"model.position={model.position}: latent attention rotates a part of its heads: set model.position=rope "
        "(model.layer_pattern=[full_no_rope] leaves the rotation out).",
    )
    _require(latent.rope_dim % 2 == 0, f"model.latent.rope_dim={latent.rope_dim}: pairs are rotated, and this is odd.")
    for name, usual in (
        ("qkv_bias", False),
        ("attention_out_bias", False),
        ("qk_norm", False),
        ("clip_qkv", None),
        ("rope_fraction", 1.0),
    ):
        value = getattr(model, name)
        _require(
            value == usual,
            f"model.{name}={str(value).lower()} does not go with model.latent, which has norms of its latents, no biases, and "
            "rope_dim for what is rotated. Leave it out.",
        )


def _check_stretching(model: ModelConfig) -> None:
    scaling = model.rope_scaling
    size = model.latent.rope_dim if model.latent.key_rank else int((model.head_dim or 0) * model.rope_fraction)
    if scaling.kind == "longrope":
        for name in ("short_factors", "long_factors"):
            count = len(getattr(scaling, name))
            _require(
                count == size // 2,
                f"model.rope_scaling.{name} has {count} numbers: longrope needs one for each rotated pair, {size // 2}.",
            )
    _require(
        scaling.kind != "yarn" or scaling.beta_fast >= scaling.beta_slow,
        f"model.rope_scaling.beta_fast={scaling.beta_fast:g}: must not lie below beta_slow={scaling.beta_slow:g}.",
    )
    _require(
        scaling.kind != "dynamic" or size > 2,
        f"model.rope_scaling.kind=dynamic needs more than one rotated pair, and {size} elements of a head are rotated.",
    )
    _require(
        scaling.kind not in ("dynamic", "yarn") or scaling.factor >= 1,
        f"model.rope_scaling.factor={scaling.factor:g}: {scaling.kind} stretches, by at least 1.",
    )


def _show(words: list[str]) -> str:
    return "[" + ", ".join(words) + "]"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
