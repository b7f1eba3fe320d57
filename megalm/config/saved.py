"""A configuration as values and as text: what a run's folder and its checkpoints hold of it, and how that is read back."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.fields import MISSING
from megalm.config.groups import list_groups
from megalm.config.model import ModelConfig
from megalm.config.objective import VALUED
from megalm.config.plugins import load_plugins
from megalm.config.root import Config
from megalm.config.typed import Kind, build, list_fields
from megalm.config.yaml_text import read_yaml_file, write_yaml


def build_config(values: dict[str, Any]) -> Config:
    """Build the configuration that nested words stand for."""
    run = values.get("run")
    named = run.get("plugins") if isinstance(run, dict) else None
    load_plugins(named if isinstance(named, list) else ([named] if isinstance(named, str) else ()))
    config = build(Kind(Config), values)
    assert isinstance(config, Config)
    missing = [name for name in list_fields(ModelConfig) if getattr(config.model, name) == MISSING]
    if missing:
        raise ConfigError(
            f"model.{missing[0]} must be given: choose a model with +model=NAME ({', '.join(list_groups()['model'])})."
        )
    return config


def fill_in(config: Config) -> None:
    """Replace what was not given by what follows from other values."""
    config.model.fill_in()
    config.model.value_head = config.model.value_head or config.objective.name in VALUED
    batches = [phase.global_batch_size for phase in config.data.phases if phase.global_batch_size]
    config.train.fill_in(config.model, batches)


def load_config(file: Path) -> Config:
    """Read back the resolved `config.yaml` of a run's folder."""
    try:
        values = read_yaml_file(file, str(file))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{file} is not there: is {file.parent} the folder of a run?") from None
    except PermissionError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    except ConfigError as error:
        raise ConfigError(_damaged(file, str(error).removeprefix(f"{file}: "))) from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(_damaged(file, "it holds no settings."))
    return make_config(values, str(file))


def _damaged(file: Path, why: str) -> str:
    return (
        f"{file} is damaged: {why} Move it away and start the run with its own command again, which writes the file anew; "
        "each checkpoint of the run goes on holding its settings too."
    )


def make_config(values: Any, where: str) -> Config:
    """Make the configuration that nested values describe, as a run's `config.yaml` or a checkpoint has them."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: holds no configuration of a run, which has keys such as model and train.")
    try:
        config = build_config(_say_as_today(values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    fill_in(config)
    return config


def _say_as_today(values: dict[str, Any]) -> dict[str, Any]:
    """Keys that had another name when the configuration was written."""
    train = values.get("train")
    if not isinstance(train, dict) or "deterministic" not in train:
        return values
    rest = {key: value for key, value in train.items() if key != "deterministic"}
    return {**values, "train": {**rest, "determinism": "strict" if train["deterministic"] else "fast"}}


def write_config_yaml(config: Config) -> str:
    """The configuration as yaml text, every field resolved."""
    return write_yaml(_plain(asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
