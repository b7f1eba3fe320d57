"""Whether a text follows the rules that its request names ("at least 300 words", "no commas"): IFEval's 25, checked by code.

if-verifiable checks them; what it would download is replaced: the prompts are rows that `megalm evaluate fetch chat` brings, and
sentences are found by nltk's Punkt with a list of abbreviations in place of its trained model.

Source: Zhou et al. 2023 (arXiv:2311.07911)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megalm.config.errors import ConfigError
from megalm.evaluate.item import Item, Task

ABBREVIATIONS = (
    "mr mrs ms dr prof sr jr st vs etc e.g i.e a.m p.m ph.d inc ltd co corp no vol fig gen col capt lt sgt rev hon gov sen rep "
    "jan feb mar apr jun jul aug sep sept oct nov dec u.s u.k u.n b.c a.d approx dept est min max mt ft"
)
"""After which a full stop ends no sentence."""


@dataclass(frozen=True)
class Followed:
    """One text and its request's rules."""

    values: dict[str, float]
    """Of the prompt 1.0 where all rules were followed; of the rules how many were; each strict and loose."""
    broken: list[str]
    """Rules that were not followed, strictly."""


def read_rules(item: Item) -> tuple[list[str], list[dict[str, Any]]]:
    """Read names of an item's rules, and the settings of each."""
    return list(item.source["instruction_id_list"]), [_drop_none(one) for one in item.source["kwargs"]]


def check_instructions(task: Task) -> None:
    """Errors: ConfigError where if-verifiable is not installed, or an item names a rule or a setting that there is not"""
    registry, _ = _open_library()
    for number, item in enumerate(task.items, 1):
        for name, settings in zip(*read_rules(item), strict=True):
            if name not in registry:
                raise ConfigError(
                    f"{task.name}, item {number}: there is no rule {name!r}; there are {', '.join(registry)}"
                )
            try:
                registry[name](name).build_description(**settings)
            except (TypeError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f"{task.name}, item {number}: the rule {name} does not take {settings} ({error})"
                ) from None


def follow_instructions(item: Item, text: str) -> Followed:
    """Check a text by its item's rules. Loose: also without its first or last line, or its asterisks."""
    registry, evaluate = _open_library()
    names, settings = read_rules(item)
    results, scores = evaluate(
        response=text,
        instruction_id_list=names,
        kwargs_list=settings,
        prompt=item.contexts[0],
        instruction_registry=registry,
    )
    strict, loose = sum(one.strict_pass for one in results), sum(one.loose_pass for one in results)
    followed = {one.instruction_id for one in results if one.strict_pass}
    values = {
        "prompt_strict": scores.binary_strict,
        "prompt_loose": scores.binary_loose,
        "rules_strict": float(strict),
        "rules_loose": float(loose),
        "rules": float(len(names)),
    }
    broken = [one.instruction_id for one in results if not one.strict_pass]
    return Followed(values, broken if results else [name for name in names if name not in followed])


def count_sentences(text: str) -> int:
    """Sentences of an English text."""
    return len(_make_splitter().tokenize(text))


def count_capital_words(text: str) -> int:
    """Count words, as nltk cuts them, that have no small letter; hyphens part none."""
    from nltk.tokenize import NLTKWordTokenizer

    cut = NLTKWordTokenizer()
    return sum(word.isupper() for sentence in _make_splitter().tokenize(text) for word in cut.tokenize(sentence))


@functools.cache
def _make_splitter() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters)


@functools.cache
def _open_library() -> tuple[Mapping[str, Any], Callable[..., Any]]:
    """Open the rules by name, and what evaluates them. Errors: ConfigError where they are not installed"""
    try:
        import langdetect
        from if_verifiable.common import evaluate_instructions
        from if_verifiable.ifeval import instructions
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"rules are checked by if-verifiable ({error.name} is missing): pip install megalm[eval]"
        ) from None
    langdetect.DetectorFactory.seed = 0  # its draws, which decide between close languages, are the same each time

    def reaches(relation: str, count: int, wanted: int) -> bool:
        return count < wanted if relation == "less than" else count >= wanted

    class Sentences(instructions.NumberOfSentences):  # type: ignore[misc]
        def check_following(self, value: str) -> bool:
            asked = self.get_instruction_args()
            return reaches(asked["relation"], count_sentences(value), asked["num_sentences"])

    class CapitalWords(instructions.CapitalWordFrequencyChecker):  # type: ignore[misc]
        def check_following(self, value: str) -> bool:
            asked = self.get_instruction_args()
            return reaches(asked["capital_relation"], count_capital_words(value), asked["capital_frequency"])

    own = {"length_constraints:number_sentences": Sentences, "change_case:capital_word_frequency": CapitalWords}
    return {**INSTRUCTION_DICT, **own}, evaluate_instructions


def _drop_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def describe_rules(names: list[str], settings: list[dict[str, Any]]) -> tuple[str, ...]:
    """Describe each rule with its settings, as it is read and digested."""
    pairs = zip(names, settings, strict=True)
    return tuple(f"{name} {json.dumps(_drop_none(one), ensure_ascii=False, sort_keys=True)}" for name, one in pairs)
