"""Rules as data: yaml into steps and bounds, in their order.

A rule is a mapping. `score` names a number that is counted of the text, `field` a number or word of the document's own,
`words`, `address`, `pii`, `language`, `classifier`, `fasttext`, `labels` and `function` look for something and give a number;
`at_least`, `at_most` and `one_of` say what stays. `edit` changes the text for the rules behind it. `include` is another set
of rules.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megalm.config.errors import ConfigError
from megalm.corpus.filter.batch import Batch, Bound, Step
from megalm.corpus.filter.classifier import Classified, load_classifier
from megalm.corpus.filter.edits import CleanLines, Normalize, Repair
from megalm.corpus.filter.fasttext_model import PREFIX, FastText
from megalm.corpus.filter.labelled import Labelled
from megalm.corpus.filter.language import LIBRARIES, Language
from megalm.corpus.filter.lists import Address, FieldValue, ListedWords, PersonalData, UserFunction
from megalm.corpus.filter.scores import SCORES, SHORT_LINE, STOP_WORDS, CountSettings

KINDS = (
    "score",
    "field",
    "words",
    "address",
    "pii",
    "language",
    "classifier",
    "fasttext",
    "labels",
    "function",
    "edit",
    "include",
)
_LIMITS = ("at_least", "at_most", "name")
_EDITS: dict[str, tuple[Callable[..., Step], tuple[str, ...]]] = {
    "clean_lines": (CleanLines, ("max_word_length", "min_words", "terminal")),
    "repair": (Repair, ()),
    "normalize": (Normalize, ("form",)),
}


@dataclass(frozen=True)
class RuleSet:
    """Steps and bounds in their order."""

    items: tuple[Step | Bound, ...]
    settings: CountSettings = CountSettings()

    @property
    def names(self) -> list[str]:
        """What each item is called in reports; steps that only give scores are nameless."""
        return [item.name if isinstance(item, Bound) else "" for item in self.items]

    @property
    def columns(self) -> list[str]:
        """The scores that documents get, in the order of the rules."""
        return list(dict.fromkeys(item.column for item in self.items if isinstance(item, Bound)))

    @property
    def needs_fields(self) -> bool:
        """Whether more than the text of a document is looked at."""
        return any(item.needs_fields for item in self.items if not isinstance(item, Bound))

    @property
    def edits(self) -> bool:
        """Whether texts may change."""
        return any(
            isinstance(item, (CleanLines, Repair, Normalize)) or getattr(item, "replace", False) for item in self.items
        )

    def apply(self, batch: Batch) -> None:
        """Runs all of them over a batch; every document gets all scores, also one that is dropped."""
        for number, item in enumerate(self.items):
            if isinstance(item, Bound):
                item.apply(batch, number)
            else:
                item.apply(batch)


def list_presets() -> list[str]:
    """List the names of the sets of rules that come with the package."""
    folder = resources.files("megalm.corpus.filter") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def describe_presets() -> dict[str, str]:
    """Name and description of each preset."""
    return {name: _read(name).get("description", "") for name in list_presets()}


def read_rules(names: Sequence[str]) -> list[dict[str, Any]]:
    """Read the contents of presets and yaml files, `include` and files of lists filled in: all that a worker needs.

    Errors: ConfigError for an unknown preset, a file that is not there or no yaml.
    """
    return [_filled(_read(name), name, ()) for name in names]


def _read(name: str) -> dict[str, Any]:
    presets = list_presets()
    if name in presets:
        text = (resources.files("megalm.corpus.filter") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            if not name.endswith((".yaml", ".yml")):
                raise ConfigError(
                    f"there are no rules {name!r}{_nearest(name, presets)}: give a yaml file, or one of {', '.join(presets)}."
                ) from error
            raise ConfigError(f"rules {name!r} cannot be read ({error}).") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"rules {name!r} are no yaml ({str(error).replace(chr(10), ' ')}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("rules"), list):
        raise ConfigError(f"rules {name!r}: a file of rules is a mapping with a list `rules`.")
    unknown = sorted(set(found) - {"rules", "description", "stop_words", "short_line"})
    if unknown:
        raise ConfigError(
            f"rules {name!r}: unknown key {unknown[0]!r}; there are rules, description, stop_words and short_line."
        )
    return found


def _filled(content: dict[str, Any], name: str, above: tuple[str, ...]) -> dict[str, Any]:
    if name in above:
        raise ConfigError(
            f"rules {name!r} include themselves, by {' -> '.join((*above, name))}: take one `include` out."
        )
    rules: list[Any] = []
    folder = os.path.dirname(name) if name not in list_presets() else ""
    for rule in content["rules"]:
        if isinstance(rule, dict) and "include" in rule:
            _refuse_unknown(rule, ("include",), name)
            wanted = str(rule["include"])
            path = wanted if wanted in list_presets() else os.path.join(folder, wanted)
            inner = _filled(_read(path), path, (*above, name))
            for key in ("stop_words", "short_line"):
                if key in inner and content.setdefault(key, inner[key]) != inner[key]:
                    raise ConfigError(f"rules {name!r}: {key} is not that of {wanted!r}, which they include: give one.")
            rules += inner["rules"]
        elif isinstance(rule, dict):
            rules.append({key: _listed(key, value, folder, name) for key, value in rule.items()})
        else:
            raise ConfigError(f"rules {name!r}: {rule!r} is no mapping: write `- score: words`, for example.")
    return {**content, "rules": rules}


def _listed(key: str, value: Any, folder: str, name: str) -> Any:
    """What a list that stands in a file (`file: PATH`) holds: a line an entry, `#` begins a remark. Of a classifier its path,
    and what changes when it is trained again."""
    if key in ("classifier", "fasttext", "labels") and isinstance(value, str):
        path = os.path.join(folder, value)
        with contextlib.suppress(OSError):  # who loads it says so
            status = os.stat(path)
            return {"path": path, "stamp": [status.st_size, status.st_mtime_ns]}
        return {"path": path, "stamp": []}
    if not isinstance(value, dict) or set(value) != {"file"}:
        return value
    path = os.path.join(folder, str(value["file"]))
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rules {name!r}: {key}: {path} cannot be read ({error}).") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def make_rules(contents: Sequence[Mapping[str, Any]]) -> RuleSet:
    """Make the rules of what `read_rules` gave, one set after another.

    Errors: ConfigError for a rule that names no score, has a key that nobody reads, or contradicts another one.
    """
    maker = _Maker()
    for content in contents:
        for rule in content["rules"]:
            maker.add(dict(rule))
    if not maker.items:
        raise ConfigError(
            "there are no rules: give some with --rules (a preset or a yaml file; --list shows the presets)."
        )
    _refuse_contradictions(maker.items)
    return RuleSet(tuple(maker.items), _settings(contents))


def _settings(contents: Sequence[Mapping[str, Any]]) -> CountSettings:
    found: dict[str, Any] = {"stop_words": list(STOP_WORDS), "short_line": SHORT_LINE}
    for key in found:
        values = [content[key] for content in contents if key in content]
        if any(value != values[0] for value in values):
            raise ConfigError(f"rules with different {key} cannot run together: give one, or run one after the other.")
        found[key] = values[0] if values else found[key]
    words, line = found["stop_words"], found["short_line"]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"stop_words is {words!r}: give a list of words.")
    if not isinstance(line, int) or line < 0:
        raise ConfigError(f"short_line is {line!r}: give a number of characters.")
    return CountSettings(tuple(dict.fromkeys(words)), line)


class _Maker:
    def __init__(self) -> None:
        self.items: list[Step | Bound] = []
        self._given: dict[str, int] = {}  # scores that steps gave, by the edits before
        self._edits = 0
        self._columns: dict[str, int] = {}

    def add(self, rule: dict[str, Any]) -> None:
        kinds = [kind for kind in KINDS if kind in rule]
        if len(kinds) != 1:
            raise ConfigError(f"rule {rule!r}: give one of {', '.join(KINDS)}" + (", not several." if kinds else "."))
        getattr(self, f"_add_{kinds[0]}")(rule)

    def _step(self, step: Step) -> None:
        self.items.append(step)
        self._given |= dict.fromkeys(step.gives, self._edits)

    def _bound(self, rule: dict[str, Any], score: str, **default: float) -> None:
        limits = {key: _number(rule, key, default) for key in ("at_least", "at_most") if key in rule or key in default}
        low, high = limits.get("at_least", -np.inf), limits.get("at_most", np.inf)
        if low > high:
            raise ConfigError(f"rule {rule!r}: at_least {low:g} is more than at_most {high:g}: nothing would stay.")
        edits = 0 if score in self._given else self._edits
        column = score if self._columns.setdefault(score, edits) == edits else f"{score}@{edits}"
        self.items.append(Bound(str(rule.get("name", column)), score, column, low, high))

    def _add_score(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("score", *_LIMITS))
        score, known = str(rule["score"]), [*SCORES, *self._given]
        if score not in known:
            later = " `edit: clean_lines` must come before it." if score in CleanLines.gives else ""
            raise ConfigError(
                f"rule {rule!r}: there is no score {score!r}{_nearest(score, known)}.{later} There are {', '.join(known)}."
            )
        self._bound(rule, score)

    def _add_field(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("field", "one_of", "missing", *_LIMITS))
        missing = rule.get("missing")
        if missing not in (None, "keep", "drop"):
            raise ConfigError(f"rule {rule!r}: missing is {missing!r}: choose keep or drop.")
        if "one_of" in rule:
            if "at_least" in rule or "at_most" in rule:
                raise ConfigError(
                    f"rule {rule!r}: one_of is for words, at_least and at_most for numbers: give one kind."
                )
            values = _strings(rule, "one_of")
            self._step(FieldValue(str(rule["field"]), missing, values))
            self._bound({**rule, "at_least": 1}, str(rule["field"]))
        else:
            self._step(FieldValue(str(rule["field"]), missing))
            self._bound(rule, str(rule["field"]))

    def _add_words(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("words", "inside", "score_name", *_LIMITS))
        step = ListedWords(_strings(rule, "words"), str(rule.get("score_name", "listed_words")), _flag(rule, "inside"))
        self._step(step)
        self._bound(rule, step.score)

    def _add_address(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("address", "domains", "words_in_it", "parts", *_LIMITS))
        lists = {
            key: tuple(value.lower() for value in _strings(rule, key)) if key in rule else ()
            for key in ("domains", "words_in_it", "parts")
        }
        if not any(lists.values()):
            raise ConfigError(f"rule {rule!r}: give domains, words_in_it or parts to look for.")
        step = Address(
            str(rule["address"]), frozenset(lists["domains"]), frozenset(lists["words_in_it"]), lists["parts"]
        )
        self._step(step)
        self._bound(rule, "listed_address", at_most=0)

    def _add_pii(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("pii", "replace", *_LIMITS))
        step = PersonalData(_strings(rule, "pii"), _flag(rule, "replace"))
        self._step(step)
        self._edits += step.replace
        self._bound(rule, "pii")

    def _add_language(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("language", "by", *_LIMITS))
        self._step(Language(_strings(rule, "language"), str(rule.get("by", LIBRARIES[0]))))
        self._bound(rule, "language")

    def _add_classifier(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("classifier", "score_name", *_LIMITS))
        path = rule["classifier"]["path"] if isinstance(rule["classifier"], dict) else str(rule["classifier"])
        load_classifier(path)  # what is wrong with it is told before anything is read
        step = Classified(path, str(rule.get("score_name", "quality")))
        self._step(step)
        self._bound(rule, step.score)

    def _add_fasttext(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("fasttext", "label", "score_name", *_LIMITS))
        if "label" not in rule:
            raise ConfigError(f"rule {rule!r}: give the label whose probability is asked for.")
        path = rule["fasttext"]["path"] if isinstance(rule["fasttext"], dict) else str(rule["fasttext"])
        label = str(rule["label"])
        step = FastText(path, label, str(rule.get("score_name", label.removeprefix(PREFIX))))
        step.check()
        self._step(step)
        self._bound(rule, step.score)

    def _add_labels(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("labels", "drop", "name"))
        path = rule["labels"]["path"] if isinstance(rule["labels"], dict) else str(rule["labels"])
        if self._edits:
            raise ConfigError(f"rule {rule!r}: labels are of texts as they were: put it before every `edit`.")
        if not os.path.isfile(path):
            raise ConfigError(f"rule {rule!r}: there is no file {path}: `megalm look DATA --labels FILE` writes it.")
        names = _strings(rule, "drop") if "drop" in rule else ("bad",)
        step = Labelled(path, names)
        if not step.keys:
            raise ConfigError(f"rule {rule!r}: no text in {path} has a label of {', '.join(names)} now.")
        self._step(step)
        self._bound(rule, "labelled", at_most=0)

    def _add_function(self, rule: dict[str, Any]) -> None:
        _refuse_unknown(rule, ("function", *_LIMITS))
        step = UserFunction(str(rule["function"]))
        self._step(step)
        self._bound(rule, step.gives[0])

    def _add_edit(self, rule: dict[str, Any]) -> None:
        edit = str(rule["edit"])
        if edit not in _EDITS:
            raise ConfigError(f"rule {rule!r}: there is no edit {edit!r}: choose one of {', '.join(_EDITS)}.")
        make, options = _EDITS[edit]
        _refuse_unknown(rule, ("edit", *options))
        given = {key: value for key, value in rule.items() if key != "edit"}
        for key, value in given.items():
            expected: type = {"terminal": bool, "form": str}.get(key, int)
            if type(value) is not expected:
                raise ConfigError(f"rule {rule!r}: {key} is {value!r}: it takes {expected.__name__}.")
        self._edits += 1
        self._step(partial(make, **given)())


def _refuse_contradictions(items: Iterable[Step | Bound]) -> None:
    ranges: dict[str, tuple[float, float]] = {}
    for item in items:
        if isinstance(item, Bound):
            low, high = ranges.get(item.column, (-math.inf, math.inf))
            low, high = max(low, item.at_least), min(high, item.at_most)
            if low > high:
                raise ConfigError(
                    f"the rules contradict each other: {item.column} is to be at least {low:g} and at most {high:g}, so nothing "
                    "would stay. Take one of them out."
                )
            ranges[item.column] = (low, high)


def _refuse_unknown(rule: Mapping[str, Any], known: Sequence[str], where: str = "") -> None:
    for key in rule:
        if key not in known:
            place = f"rules {where!r}: " if where else ""
            raise ConfigError(
                f"{place}rule {dict(rule)!r}: unknown key {key!r}{_nearest(str(key), known)}; it takes {', '.join(known)}."
            )


def _number(rule: Mapping[str, Any], key: str, default: Mapping[str, float]) -> float:
    value = rule.get(key, default.get(key))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ConfigError(f"rule {dict(rule)!r}: {key} is {value!r}: give a number.")
    return float(value)


def _flag(rule: Mapping[str, Any], key: str) -> bool:
    value = rule.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"rule {dict(rule)!r}: {key} is {value!r}: give true or false.")
    return value


def _strings(rule: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = rule[key]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(one, (str, int)) for one in values):
        raise ConfigError(
            f"rule {dict(rule)!r}: {key} is {value!r}: give a list of words, or `file: PATH`, a word a line."
        )
    return tuple(map(str, values))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (nearest: {close[0]})" if close else ""
