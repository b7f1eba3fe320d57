"""`+model=PATH.yaml`: a model described in a file of one's own, such as the one that an import writes."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.model import ModelConfig
from megalm.config.typed import list_fields
from megalm.config.yaml_text import read_yaml_file, write_yaml


def read_model_file(path: Path) -> dict[str, Any]:
    """Read the words of a model's file, in nested mappings as conf/model/*.yaml have them.

    In a run's config.yaml those under `model:` are taken. What the command line says of the model wins over them.
    Errors: ConfigError if the file is not there, is no yaml mapping, or has keys that a model does not.
    """
    where = f"model={path}"
    try:
        values = read_yaml_file(path, where)
    except OSError as error:
        raise ConfigError(
            f"{where}: {error.strerror}. Give the path of a yaml file with a model's keys, or a name of conf/model."
        ) from None
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        values = values["model"]
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{where}: holds no keys of a model, such as num_layers: 12.")
    _check_keys(where, values, ModelConfig, "model")
    return values


def _check_keys(where: str, values: dict[str, Any], known: type, prefix: str) -> None:
    kinds = list_fields(known)
    for key, value in values.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where}: unknown key {prefix}.{key}.{hint} Keys: {', '.join(kinds)}.")
        if isinstance(value, dict) and kinds[key].is_group:
            _check_keys(where, value, kinds[key].type, f"{prefix}.{key}")


def write_model_yaml(model: ModelConfig) -> str:
    """The model as the text of such a file: what differs from the defaults."""
    return write_yaml(_differing(model, ModelConfig()))


def _differing(values: Any, defaults: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(values):
        value, default = getattr(values, field.name), getattr(defaults, field.name)
        if field.name == "moe" and not value.num_experts:
            continue
        if dataclasses.is_dataclass(value):
            if inner := _differing(value, default):
                found[field.name] = inner
        elif value != default:
            found[field.name] = value
    return found
