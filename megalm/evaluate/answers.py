"""Whether what a model wrote is one of the answers: lm-eval's filters and exact match, and the gauntlet's."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from megalm.config.errors import ConfigError

NO_ANSWER = "[invalid]"
"""What a filter gives where its pattern is not found."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)


def match_answer(text: str, answers: Sequence[str], compare: Mapping[str, Any]) -> dict[str, float]:
    """Name of each measure -> 1.0 where the text is right by it.

    compare: `math` where values count, however they are written; `normalize` for the gauntlet's way, of what stands after the
    last `after` where there is one; else lm-eval's options of
    `exact_match`, and its `filters`, of each of which the measure is `exact_match,NAME`.
    Source: exact_match and filters of lm-eval 0.4.13; InContextLearningGenerationExactMatchAccuracy of llm-foundry
    """
    if compare.get("math"):
        return {"math": float(any(is_same_number(text, answer) for answer in answers))}
    if compare.get("normalize"):
        if compare.get("after"):
            text = text.split(str(compare["after"]))[-1]
        written = normalize(text)
        return {"exact_match": float(any(written.startswith(normalize(answer)) for answer in answers))}
    filters = compare.get("filters") or []
    options = {key: value for key, value in compare.items() if key != "filters"}
    if not filters:
        return {"exact_match": float(any(_equal(text, answer, options) for answer in answers))}
    found = {}
    for one in filters:
        filtered = apply_filters(text, one.get("filter") or [])
        found[f"exact_match,{one['name']}"] = float(any(_equal(filtered, answer, options) for answer in answers))
    return found


def is_same_number(text: str, answer: str) -> bool:
    """Whether the text's last mathematical expression has the answer's value: 1/2 is 0.5, and $29.00 is 29.

    Errors: ConfigError where math-verify is not installed
    """
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError:
        raise ConfigError("answers are compared as mathematics by math-verify: pip install megalm[eval]") from None
    right, found = parse(answer, parsing_timeout=None), parse(text, parsing_timeout=None)
    return bool(right and found and verify(right, found, timeout_seconds=None))


def normalize(text: str) -> str:
    """Small letters without articles, punctuation and repeated blanks."""
    text = text.replace("_", " ").lower()
    text = "".join(" " if letter in string.punctuation + "‘’´`" else letter for letter in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def apply_filters(text: str, filters: Sequence[Mapping[str, Any]]) -> str:
    """The text after each step of a filter. Errors: ConfigError for a step that is not known here"""
    for step in filters:
        kind = step.get("function")
        if kind == "regex":
            text = _find(text, step)
        elif kind == "remove_whitespace":
            text = text.lstrip()
        elif kind == "lowercase":
            text = text.lower()
        elif kind == "uppercase":
            text = text.upper()
        elif kind not in ("take_first",):
            raise ConfigError(
                f"the filter {kind!r} is not known; there are regex, remove_whitespace, lowercase, uppercase, take_first"
            )
    return text


def _find(text: str, step: Mapping[str, Any]) -> str:
    found = re.findall(step.get("regex_pattern", r"#### (\-?[0-9\.\,]+)"), text)
    fallback = str(step.get("fallback", NO_ANSWER))
    if not found:
        return fallback
    try:
        match = found[int(step.get("group_select", 0))]
    except IndexError:
        return fallback
    if isinstance(match, tuple):
        groups = [group for group in match if group]
        match = groups[0] if groups else fallback
    return match.strip()


def _equal(text: str, answer: str, options: Mapping[str, Any]) -> bool:
    sides = [text, answer]
    for pattern in options.get("regexes_to_ignore") or []:
        sides = [re.sub(pattern, "", side) for side in sides]
    if options.get("ignore_case"):
        sides = [side.lower() for side in sides]
    if options.get("ignore_punctuation"):
        sides = [side.translate(_PUNCTUATION) for side in sides]
    if options.get("ignore_numbers"):
        sides = [side.translate(_DIGITS) for side in sides]
    return sides[0] == sides[1]
