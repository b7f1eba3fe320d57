"""Tasks as lm-eval's YAML writes them, over local files."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megalm.config.errors import ConfigError
from megalm.evaluate.item import Item, Task
from megalm.evaluate.tasks.rows import read_rows

OUTPUT_KINDS = {
    "multiple_choice": "choice",
    "loglikelihood": "cloze",
    "loglikelihood_rolling": "text",
    "generate_until": "generate",
}


class _Loader(yaml.SafeLoader):
    """Plain YAML; `!function` is code of another's, which is not run."""


def _refuse_function(loader: yaml.SafeLoader, node: yaml.Node) -> object:
    raise ConfigError(
        f"line {node.start_mark.line + 1}: !function {getattr(node, 'value', '')} names Python code, which is not run here. "
        "Write the rows out once (process_docs), or run the task by lm-eval: lm_eval --model megalm."
    )


_Loader.add_constructor("!function", _refuse_function)


def read_yaml(path: Path) -> Any:
    """Read the file's content. Errors: ConfigError for what cannot be read or is no YAML"""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def read_settings(path: Path, depth: int = 0) -> dict[str, Any]:
    """Read a task's settings, with those of the file that it includes below them."""
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: a task is a mapping with task, dataset_kwargs, doc_to_text, ...")
    if (include := settings.pop("include", None)) is not None:
        if depth > 8:
            raise ConfigError(f"{path}: includes itself through {include!r}")
        settings = {**read_settings(path.parent / str(include), depth + 1), **settings}
    return settings


class _Templates:
    """Fields of a row by name, or Jinja templates over it, as lm-eval reads them."""

    def __init__(self, where: str) -> None:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment

        self.where = where
        self.environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self.environment.filters["regex_replace"] = lambda text, pattern, by, count=0: re.sub(
            pattern, by, text, count=count
        )
        self._compiled: dict[str, Any] = {}

    def value(self, wanted: Any, row: Mapping[str, Any], name: str, *, numbers: bool = False) -> Any:
        """What a setting gives for a row; `numbers`: a text of digits is one."""
        if not isinstance(wanted, str):
            return list(wanted.values()) if isinstance(wanted, dict) else wanted
        if wanted in row:
            return row[wanted]
        try:
            if wanted not in self._compiled:
                self._compiled[wanted] = self.environment.from_string(wanted)
            text = self._compiled[wanted].render(**row)
        except Exception as error:
            raise ConfigError(f"{self.where}: {name} cannot be made of a row ({error}); it is {wanted!r}") from None
        if numbers and text.isdigit():
            return int(text)
        if name != "doc_to_text" and len(text) >= 2 and text[0] == "[" and text[-1] == "]":
            try:
                return ast.literal_eval(text)
            except (SyntaxError, ValueError):
                return text
        return text


def read_task(path: Path) -> Task:
    """One task of a YAML file. Errors: ConfigError for a setting that is missing, or that cannot be followed here"""
    settings = read_settings(path)
    kind = OUTPUT_KINDS.get(settings.get("output_type", "generate_until"))
    if kind is None:
        raise ConfigError(f"{path}: output_type {settings['output_type']!r}; there are {', '.join(OUTPUT_KINDS)}")
    splits = _splits(path, settings)
    split = settings.get("test_split") or settings.get("validation_split") or next(iter(splits))
    if split not in splits:
        raise ConfigError(f"{path}: test_split {split!r} is no file of data_files, which has {', '.join(splits)}")
    templates = _Templates(str(path))
    items = tuple(_item(kind, settings, row, templates, where) for where, row in read_rows(splits[split]))
    fewshot = settings.get("fewshot_config") or {}
    shot_split = settings.get("fewshot_split") or fewshot.get("split")
    shot_rows: list[tuple[str, dict[str, Any]]] | None = None
    if shot_split and shot_split != split:
        if shot_split not in splits:
            raise ConfigError(f"{path}: fewshot_split {shot_split!r} is no file of data_files")
        shot_rows = list(read_rows(splits[shot_split]))
    elif isinstance(fewshot.get("samples"), list):
        shot_rows = [(f"{path}, fewshot_config.samples", row) for row in fewshot["samples"]]
    generation = settings.get("generation_kwargs") or {}
    until = generation.get("until", [])
    metrics = settings.get("metric_list") or []
    compare = next((dict(m) for m in metrics if isinstance(m, dict) and m.get("metric") == "exact_match"), {})
    return Task(
        name=str(settings.get("task") or path.stem),
        kind="schema" if items and items[0].kind == "schema" else kind,
        items=items,
        num_fewshot=int(settings.get("num_fewshot") or 0),
        shots=None
        if shot_rows is None
        else tuple(_item(kind, settings, row, templates, where) for where, row in shot_rows),
        sampler=str(fewshot.get("sampler", "default")),
        description=str(settings.get("description") or ""),
        delimiter=str(settings.get("target_delimiter", " ")),
        example_delimiter=str(settings.get("fewshot_delimiter", "\n\n")),
        bare_target=kind == "cloze",
        stop=tuple([until] if isinstance(until, str) else until),
        max_tokens=int(generation.get("max_gen_toks", 256)),
        compare={**compare, "filters": settings.get("filter_list") or []},
        version=str((settings.get("metadata") or {}).get("version", "")),
    )


def _splits(path: Path, settings: Mapping[str, Any]) -> dict[str, Path]:
    """Name of each split -> its local file."""
    if settings.get("dataset_path") != "json":
        raise ConfigError(
            f"{path}: dataset_path is {settings.get('dataset_path')!r}: only local files are read. Fetch the rows as jsonl and "
            "write dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}."
        )
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, str):
        files = {"train": files}
    if not isinstance(files, dict) or not files:
        raise ConfigError(f"{path}: dataset_kwargs.data_files is {files!r}; it names a jsonl file for each split")
    found = {}
    for name, file in files.items():
        one = file[0] if isinstance(file, list) and len(file) == 1 else file
        if not isinstance(one, str):
            raise ConfigError(f"{path}: data_files.{name} is {file!r}; one file a split is read")
        place = path.parent / one
        found[str(name)] = place if place.exists() or not Path(one).exists() else Path(one)
    return found


def _item(kind: str, settings: Mapping[str, Any], row: Mapping[str, Any], templates: _Templates, where: str) -> Item:
    def value(name: str) -> Any:
        if name not in settings:
            raise ConfigError(f"{templates.where}: {name} is missing")
        chooses = settings.get("doc_to_choice") is not None and name != "doc_to_choice"
        return templates.value(settings[name], row, name, numbers=chooses)

    target = value("doc_to_target")
    if kind == "text":
        return Item(kind, (), (str(target),), (0,), row)
    text = value("doc_to_text")
    if kind == "choice":
        choices = value("doc_to_choice")
        if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
            raise ConfigError(f"{where}: doc_to_choice gives {choices!r}; it must be texts that are not empty")
        if isinstance(text, int) and not isinstance(text, bool):  # the choices are contexts (WinoGrande)
            return Item("schema", tuple(choices), (str(target),), _gold(text, choices, where), row)
        return Item(kind, (str(text),), tuple(choices), _gold(target, choices, where), row)
    if kind == "cloze":
        return Item(kind, (str(text),), (str(target),), (0,), row)
    if settings.get("doc_to_choice") is not None:
        target = value("doc_to_choice")[target]
    answers = target if isinstance(target, list) else [target]
    return Item("generate", (str(text),), tuple(str(one) for one in answers), (0,), row)


def _gold(target: Any, choices: list[str], where: str) -> tuple[int, ...]:
    targets = target if isinstance(target, list) else [target]
    numbers = [choices.index(one) if isinstance(one, str) and one in choices else one for one in targets]
    if not numbers or not all(isinstance(n, int) and 0 <= n < len(choices) for n in numbers):
        raise ConfigError(f"{where}: doc_to_target gives {target!r}, which is none of the {len(choices)} choices")
    return tuple(numbers)
