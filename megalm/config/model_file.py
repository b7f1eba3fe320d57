"""`+model=PATH.yaml`: a model described in a file of one's own, such as the one that an import writes."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from megalm.config.errors import ConfigError
from megalm.config.model import ModelConfig

_GIVEN = re.compile(r"\+{0,2}model=(.+\.ya?ml)")


def expand_model_file(override: str) -> list[str]:
    """`+model=PATH.yaml` as the overrides `model.key=value` that the file stands for; any other override as it is.

    The file has the keys of conf/model/*.yaml; in a run's config.yaml those under `model:` are taken. Overrides that
    come later on the command line win.
    Errors: ConfigError if it is not there, is no yaml mapping, or has keys that a model does not.
    """
    match = _GIVEN.fullmatch(override)
    if match is None:
        return [override]
    path = Path(match[1].strip("'\""))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"model={path}: {error.strerror}. Give the path of a yaml file with a model's keys, or a name of conf/model."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"model={path}: not yaml ({str(error).splitlines()[0]}).") from None
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        values = values["model"]
    if not isinstance(values, dict):
        raise ConfigError(f"model={path}: holds no keys of a model, such as num_layers: 12.")
    return _flat(path, values, ModelConfig(), "model")


def model_yaml(model: ModelConfig) -> str:
    """The model as the text of such a file: what differs from the defaults."""
    return yaml.safe_dump(_differing(model, ModelConfig()), sort_keys=False)


def _flat(path: Path, values: dict[Any, Any], known: Any, prefix: str) -> list[str]:
    fields = [field.name for field in dataclasses.fields(known)]
    found = []
    for key, value in values.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"model={path}: unknown key {prefix}.{key}.{hint} Keys: {', '.join(fields)}.")
        if isinstance(value, dict):
            found += _flat(path, value, getattr(known, key), f"{prefix}.{key}")
        else:
            found.append(f"{prefix}.{key}={_literal(value)}")
    return found


def _literal(value: Any) -> str:
    """A value as Hydra's command line takes it: a backslash means something only before a quotation mark."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value))
    return f"'{escaped}'"


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
