"""From command-line overrides to a checked `Config`; every mistake becomes one `ConfigError`."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalm.config.errors import ConfigError
from megalm.config.model_file import expand_model_file
from megalm.config.root import Config
from megalm.config.validate import validate


def conf_dir() -> Path:
    """Folder of the yaml groups: beside the package in a source tree, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(
        f"conf/config.yaml was found neither in {package} nor beside it. Install megalm again: pip install ."
    )


def groups() -> dict[str, list[str]]:
    """The choices of each configuration group, by name: {"model": ["125m", ...], ...}."""
    root = conf_dir()
    found: dict[str, list[str]] = {}
    for file in sorted(root.glob("*/**/*.yaml")):
        group, _, choice = file.relative_to(root).with_suffix("").as_posix().partition("/")
        found.setdefault(group, []).append(choice)
    return found


def compose_config(overrides: Sequence[str], *, check: bool = True) -> Config:
    """Compose, type-check, fill in and (with `check`) cross-validate a run's configuration.

    Args:
        overrides: what stands on the command line: `+model=tiny`, `+model=PATH.yaml`, `optim.lr=1e-3`, ...
    Errors: ConfigError for an unknown key, a wrong type, an unknown choice or values that do not go together.
    """
    available = groups()
    normal = [_normalise(word, available) for override in overrides for word in expand_model_file(override)]
    ConfigStore.instance().store(name="base_config", node=Config)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            composed = compose("config", overrides=normal)
        _refuse_unknown_keys(composed, Config())
        config = OmegaConf.to_object(composed)
    except OverrideParseException as error:
        raise ConfigError(
            f"cannot read the override {error.override!r}: write key=value, for example train.steps=100 or +model=tiny."
        ) from None
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, normal, available)) from None
    assert isinstance(config, Config)
    config.model.fill_in()
    config.train.fill_in(config.model)
    if check:
        validate(config)
    return config


def load_config(file: Path) -> Config:
    """Read back the resolved `config.yaml` of a run's folder."""
    try:
        values = OmegaConf.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{file} is not there: is {file.parent} the folder of a run?") from None
    except PermissionError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        OSError,
        ValueError,
    ) as error:  # OSError: OmegaConf's, of a lone scalar
        raise ConfigError(_damaged(file, _first_line(error))) from None
    if not isinstance(values, DictConfig) or not values:
        raise ConfigError(_damaged(file, "it holds no settings."))
    return config_from(values, str(file))


def _damaged(file: Path, why: str) -> str:
    return (
        f"{file} is damaged: {why} Move it away and start the run with its own command again, which writes the file anew; "
        "each checkpoint of the run goes on holding its settings too."
    )


def config_from(values: Any, where: str) -> Config:
    """The configuration that nested values describe, as a run's `config.yaml` or a checkpoint has them."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from None
    assert isinstance(config, Config)
    config.model.fill_in()
    return config


def config_yaml(config: Config) -> str:
    """The configuration as yaml text, every field resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def model_is_given(overrides: Sequence[str]) -> bool:
    """Whether the overrides choose a model, or give its shape by hand."""
    return any(re.match(r"\+{0,2}model(=|\.num_layers=)", o) or re.match(r"\+experiment=", o) for o in overrides)


def _normalise(override: str, available: dict[str, list[str]]) -> str:
    """`model=30b` means `+model=30b`: the group is not in the defaults list, and nobody should have to know that."""
    key, separator, value = override.partition("=")
    if separator and key in ("model", "experiment"):
        override = f"+{override}"
    if key == "checkpoint.async":  # a word that Python keeps for itself
        return f"checkpoint.asynchronous={value}"
    if separator and key.lstrip("+") in available and re.fullmatch(r"[\w./-]+", value):
        group, choices = key.lstrip("+"), available[key.lstrip("+")]
        if value not in choices and value != "null":
            raise ConfigError(
                f"{group}={value}: there is no such {group}. Choices: {', '.join(choices)}.{_closest(value, choices)}"
            )
    return override


def _explain(error: Exception, overrides: Sequence[str], available: dict[str, list[str]]) -> str:
    """One sentence for a person out of Hydra's or OmegaConf's exception."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = _first_line(cause)
    unknown = re.search(r"Key '([^']*)' not in '?\w+'?|Key '([^']*)' is not in struct|not find '([^']+)'", str(cause))
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    if unknown:
        name = key or next(group for group in unknown.groups() if group)
        parent, _, leaf = name.rpartition(".")
        siblings = _keys_under(parent)
        listing = f" Keys of {parent or 'the configuration'}: {', '.join(siblings)}." if siblings else ""
        return f"unknown key {name!r}.{_closest(leaf, siblings)}{listing}"
    if "Missing mandatory value" in str(cause) or "???" in str(cause):
        return f"{key or text} must be given: choose a model with +model=NAME ({', '.join(available['model'])})."
    given = next((o for o in reversed(overrides) if key and o.lstrip("+").startswith(f"{key}=")), None)
    if key:
        return f"{given or key}: {text}"
    return text


def _refuse_unknown_keys(given: DictConfig, known: Any, prefix: str = "") -> None:
    """`+key=value` adds any key it likes; only those of the dataclasses mean something."""
    names = [f.name for f in fields(known)]
    for key in given:
        if key not in names:
            raise ConfigError(
                f"unknown key {prefix + str(key)!r}.{_closest(str(key), names)} "
                f"Keys of {prefix.rstrip('.') or 'the configuration'}: {', '.join(names)}."
            )
        inner = getattr(known, str(key))
        if is_dataclass(inner) and not OmegaConf.is_missing(given, key):
            _refuse_unknown_keys(given[key], inner, f"{prefix}{key}.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


def _closest(word: str, candidates: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, candidates, n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _keys_under(parent: str) -> list[str]:
    """The field names of the dataclass that the dotted path `parent` leads to."""
    node: object = Config()
    for part in filter(None, parent.split(".")):
        node = getattr(node, part, None)
    return [f.name for f in fields(node)] if is_dataclass(node) else []
