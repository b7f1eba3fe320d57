"""Windows of a config.json: `sliding_window` for all layers, or for those that `layer_types` or a pattern names."""

from __future__ import annotations

from collections.abc import Callable

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert.families.family import Config, Json

_WORDS = {"full_attention": "full", "sliding_attention": "window"}


def read_window(default: int | None) -> Callable[[Config, ModelConfig], None]:
    """Make a reader of a window that all layers have (Mistral)."""

    def read(json: Config, model: ModelConfig) -> None:
        window = json.get("sliding_window", default)
        if window is not None and window < model.seq_length:  # else it holds every sequence, and is none
            model.window = window

    return read


def write_window(model: ModelConfig) -> Json:
    """Write a window that all layers have."""
    return {"sliding_window": model.window}


def read_qwen_windows(json: Config, model: ModelConfig) -> None:
    """Read Qwen's windows, which stand on some layers, if at all. One that holds the whole context is none."""
    window = json.get("sliding_window", 4096)
    kinds = json.get("layer_types")
    first = json.get("max_window_layers", 28)
    on = json.get("use_sliding_window", False)
    if kinds is None:
        kinds = [
            "sliding_attention" if on and index >= first else "full_attention" for index in range(model.num_layers)
        ]
    words = name_layer_kinds(model, kinds)
    if not on and "window" in words and window is not None:
        raise ConfigError(
            "config.json: layer_types has sliding_attention and use_sliding_window is false; say true for windows, or "
            "full_attention in all layers for none"
        )
    if window is not None and window < model.seq_length and "window" in words:
        model.window = window
        set_pattern(model, words)


def write_qwen_windows(model: ModelConfig) -> Json:
    """Write windows as Qwen's classes read them."""
    if model.window is None:
        return {"use_sliding_window": False}
    kinds = [_kind(word) for word in map(model.attends, range(model.num_layers))]
    return {"use_sliding_window": True, "sliding_window": model.window, "max_window_layers": 0, "layer_types": kinds}


def make_pattern_reader(every: int, window: int | None = 4096) -> Callable[[Config, ModelConfig], None]:
    """Make a reader of windows on all but every so many-th layer; the numbers are transformers' defaults."""

    def read(json: Config, model: ModelConfig) -> None:
        said = [json.get(key) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
        period = next((number for number in said if number), every)
        kinds = json.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(model.num_layers)]
        words = name_layer_kinds(model, kinds)
        model.window = json.get("sliding_window", window)
        if model.window is None and "window" in words:
            raise ConfigError("config.json: layer_types has sliding_attention and sliding_window is missing")
        if "window" not in words:
            model.window = None
        set_pattern(model, words)

    return read


def write_pattern(model: ModelConfig) -> Json:
    """Write the window and which layers have it."""
    return {
        "sliding_window": model.window or model.seq_length,
        "layer_types": [_kind(word) for word in map(model.attends, range(model.num_layers))],
    }


def name_layer_kinds(model: ModelConfig, kinds: list[str]) -> list[str]:
    """Name `layer_types` as model.layer_pattern does. Errors: ConfigError for other kinds, or another number."""
    strange = sorted(set(kinds) - set(_WORDS))
    if strange:
        raise ConfigError(f"config.json: layer_types has {strange[0]!r}; {' and '.join(_WORDS)} are computed here")
    if len(kinds) != model.num_layers:
        raise ConfigError(
            f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers says {model.num_layers}"
        )
    return [_WORDS[kind] for kind in kinds]


def set_pattern(model: ModelConfig, words: list[str]) -> None:
    """Give the model its pattern, as short as it can be said."""
    usual = "full" if model.window is None else "window"
    length = next(n for n in range(1, len(words) + 1) if all(w == words[i % n] for i, w in enumerate(words)))
    model.layer_pattern = [] if set(words) == {usual} else words[:length]


def _kind(word: str) -> str:
    return "sliding_attention" if word.startswith("window") else "full_attention"
