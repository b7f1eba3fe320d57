"""Yaml files as they were typed: every scalar is text until the field that takes it says what it is."""

from pathlib import Path
from typing import Any

import yaml

from megalm.config.errors import ConfigError
from megalm.config.scalars import read_any

_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


class _AsTyped(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Yaml would make a number of 1e5, 1_000 and 1.10, and a truth of `on`; here only null is more than its letters."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if not isinstance(name, str) or key.tag == _KEPT[0]:
                raise yaml.constructor.ConstructorError(None, None, "a key that is not one word", key.start_mark)
            if name in seen and key.tag != _KEPT[1]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


class _Dumper(yaml.SafeDumper):
    """Quotes each text that some reader of yaml would take for a number: 1e5 is one for those of yaml 1.2."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    looks_other = not isinstance(read_any(text), str) or text.strip().lower().removeprefix(".") in ("inf", "nan")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if looks_other else None)


_Dumper.add_representer(str, _represent_text)


def write_yaml(values: Any) -> str:
    """Mappings, lists, numbers and texts as yaml that every reader takes for the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def read_yaml(text: str, where: str) -> Any:
    """Read the mappings, lists and words of a yaml text.

    Errors: ConfigError that names `where` and the line, for what is not yaml or has a key twice.
    """
    try:
        return yaml.load(text, Loader=_AsTyped)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}: not yaml{line} ({problem})..") from None


def read_yaml_file(path: Path, where: str) -> Any:
    """`read_yaml` of a file. Errors: ConfigError, also where it cannot be read; the system's where it is not there."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise  # the caller knows what the file was meant to be
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not yaml (its bytes are not UTF-8 text). Correct the file.") from None
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}.") from None
    return read_yaml(text, where)
