"""From command-line words to a checked `Config`; every mistake becomes one `ConfigError`.

Hydra puts the yaml files of the chosen groups together, as words; the fields' types then say what each word is.
"""

import zlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalm.config.errors import ConfigError
from megalm.config.groups import find_conf_dir, find_group_files, list_groups, take_out_folders
from megalm.config.model_file import read_model_file
from megalm.config.ranges import check_fields
from megalm.config.root import Config
from megalm.config.saved import build_config, fill_in
from megalm.config.typed import Kind, list_fields, show
from megalm.config.validate import validate
from megalm.config.words import Setting, Words, read_words, take_out_search
from megalm.config.yaml_text import read_yaml_file

ALTERNATIVES = (("train.steps", "train.tokens"), ("optim.min_lr", "optim.min_lr_ratio"))
"""Two ways to say one thing: what the command line gives replaces the other one of a yaml file."""


def compose_config(overrides: Sequence[str], *, check: bool = True) -> Config:
    """Compose, type-check, fill in and (with `check`) cross-validate a run's configuration.

    Args:
        overrides: what stands on the command line: `+model=tiny`, `+model=PATH.yaml`, `optim.lr=1e-3`,
            `--config-dir FOLDER`, ...
    Errors: ConfigError for an unknown key, a wrong type, an unknown choice or values that do not go together.
    """
    given, folders = take_out_folders(overrides)
    words = read_words(given, list_groups(folders))
    values = _of_files(words, folders)
    _settle_alternatives(values, words.settings)
    for setting in words.settings:
        _set(values, setting)
    config = build_config(_follow_references(values))
    check_fields(config)
    fill_in(config)
    if check:
        validate(config)
    return config


def model_is_given(overrides: Sequence[str]) -> bool:
    """Whether the overrides choose a model, or give its shape by hand. Errors: as `read_words`."""
    rest, folders = take_out_folders(take_out_search(overrides)[0])
    words = read_words(rest, list_groups(folders))
    given = {setting.key for setting in words.settings}
    return (
        words.model_file is not None
        or bool({"model", "experiment"} & set(words.choices))
        or "model.num_layers" in given
    )


def _of_files(words: Words, folders: Sequence[Path]) -> dict[str, Any]:
    """What the yaml files of the chosen groups, and a model's own file, say together."""
    _store("config", find_conf_dir() / "config.yaml")
    for name, file in find_group_files(folders).items():
        _store(name, file)
    choices = dict(words.choices)
    for group, file in words.files.items():
        choices[group] = f"own-{zlib.crc32(bytes(file.resolve())):08x}"
        _store(f"{group}/{choices[group]}", file)
    GlobalHydra.instance().clear()
    added = ("model", "experiment")  # not in the list of defaults
    named = [f"{'+' if group in added else ''}{group}='{name}'" for group, name in choices.items()]
    try:
        with initialize(version_base="1.3", config_path=None):
            composed = compose("config", overrides=named)
        values = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"the yaml files {_named(words, folders)} do not go together: {str(error).strip().splitlines()[0]}"
        ) from None
    assert isinstance(values, dict)
    found: dict[str, Any] = {str(key): value for key, value in values.items()}
    if words.model_file is not None:
        _merge(found.setdefault("model", {}), read_model_file(words.model_file))
    return found


def _named(words: Words, folders: Sequence[Path]) -> str:
    files = find_group_files(folders)
    chosen = [str(files[f"{group}/{name}"]) for group, name in words.choices.items()] + [
        str(f) for f in words.files.values()
    ]
    return ", ".join(chosen) or f"of {find_conf_dir()}"


def _store(name: str, file: Path) -> None:
    """Let Hydra know a file under its group and name, unless it does already."""
    changed = file.stat().st_mtime_ns
    if _STORED.get(name) == (file, changed):
        return
    group, _, choice = name.rpartition("/")
    package = _package(file) or ("_global_" if group.partition("/")[0] == "experiment" else None)
    node = _read_group_file(file, group.partition("/")[0])
    ConfigStore.instance().store(choice, node, group=group or None, package=package)
    _STORED[name] = (file, changed)


_STORED: dict[str, tuple[Path, int]] = {}
"""What Hydra holds already: by the group and name of a file, the file and when it was changed."""


def _read_group_file(file: Path, group: str) -> dict[str, Any]:
    """Read the keys of a file; those of a group may stand under its name (`data: {train: ...}`), as in a run's config.yaml."""
    try:
        values = read_yaml_file(file, str(file)) or {}
    except OSError as error:
        raise ConfigError(f"{group}={file}: {error.strerror}. Give the path of a yaml file.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: holds no keys. Correct the file, or remove it.")
    inner = values.get(group)
    return inner if isinstance(inner, dict) and len(values) == 1 else values


def _package(file: Path) -> str | None:
    """Where in the configuration the file's keys belong, when its head says so (`# @package _global_`)."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("#"):
                return None
            if line.lstrip("# ").startswith("@package"):
                return line.split()[-1]
    return None


def _settle_alternatives(values: dict[str, Any], settings: Sequence[Setting]) -> None:
    """Of two keys that say one thing the command line's counts. Errors: ConfigError where one place gives both."""
    given = {setting.key: setting.value for setting in settings if setting.value is not None}
    for pair in ALTERNATIVES:
        typed = [key for key in pair if key in given]
        if len(typed) == 2:
            raise ConfigError(
                f"{pair[0]}={show(given[pair[0]])} and {pair[1]}={show(given[pair[1]])}: give one of them."
            )
        for one, other in (pair, pair[::-1]):
            if typed == [one]:
                _set(values, Setting(other, None))
    for one, other in ALTERNATIVES:
        cleared = {setting.key for setting in settings if setting.value is None}
        in_files = [key for key in (one, other) if _get(values, key) is not None and key not in cleared]
        if len(in_files) == 2:
            raise ConfigError(f"the yaml files give {one} and {other}: set one of them to null.")


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _set(values: dict[str, Any], setting: Setting) -> None:
    """Put one value into its place; a mapping joins what is there."""
    path, place, kind = setting.path, values, Kind(Config)
    for number, part in enumerate(path[:-1]):
        kind = list_fields(kind.type)[part] if kind.is_group else kind.part()
        if kind.is_mapping:
            path = [*path[: number + 1], ".".join(path[number + 1 :])]
        if isinstance(place, list):
            place = _item(place, part, path)
        else:
            if not isinstance(place.get(part), dict | list):
                place[part] = list(kind.default or []) if kind.is_list else {}
            place = place[part]
        if kind.is_mapping:
            break
    if isinstance(place, list):
        _item(place, path[-1], path)
        place[int(path[-1])] = setting.value
    elif isinstance(setting.value, dict) and isinstance(place.get(path[-1]), dict):
        _merge(place[path[-1]], setting.value)
    else:
        place[path[-1]] = setting.value


def _item(items: list[Any], number: str, path: Sequence[str]) -> Any:
    if int(number) >= len(items):
        where = ".".join(path)
        raise ConfigError(f"{where}: the list has {len(items)} item{'s' * (len(items) != 1)}, counted from 0.")
    return items[int(number)]


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _follow_references(values: dict[str, Any]) -> dict[str, Any]:
    """`${train.seed}` means that key's value, `${oc.env:USER}` the environment's."""
    if not _refers(values):
        return values
    try:
        tree = OmegaConf.merge(OmegaConf.create(_defaults(Config)), OmegaConf.create(values))
        followed: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        raise ConfigError(
            f"{key}: what stands in ${{...}} is no key that has a value. Correct it, or write \\${{ where the text itself is "
            "meant."
        ) from None
    return {key: _replaced(value, followed[key]) for key, value in values.items()}


def _refers(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_refers, value.values()))
    if isinstance(value, list):
        return any(map(_refers, value))
    return isinstance(value, str) and "${" in value


def _replaced(value: Any, followed: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(inner, followed[key]) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, there) for inner, there in zip(value, followed, strict=True)]
    return followed if isinstance(value, str) and "${" in value else value


def _defaults(group: type) -> dict[str, Any]:
    """The fields' defaults, for references to what nobody set."""
    found: dict[str, Any] = {}
    for field in fields(group):
        kind = list_fields(group)[field.name]
        if kind.is_group:
            found[field.name] = _defaults(kind.type)
        elif not (kind.is_list and is_dataclass(kind.part().type)):
            found[field.name] = list(kind.default) if isinstance(kind.default, tuple) else kind.default
    return found
