"""What is wrong with instruction data or pairs of answers, before a model learns from them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalm.config.errors import ConfigError
from megalm.evaluate.statistics import wilson_interval
from megalm.plan.cost import price_human_data
from megalm.posttrain.pairs import is_pair, parse_pair_record
from megalm.posttrain.records import BadRecord, Record, parse_record, read_values
from megalm.posttrain.render import Renderer

REFUSAL = re.compile(
    r"^\W*(?:(?:i[’']?m|i am) (?:(?:really|very|so|truly) )?(?:sorry|unable|not able)|sorry,? (?:but )?i|i apologi[sz]e|"
    r"i (?:can ?not|can[’']t|won[’']t)|as an? (?:ai|artificial|language))\b",
    re.IGNORECASE,
)
"""How an answer begins that declines: "I'm sorry", "I cannot", "As an AI"."""
DEVIATIONS = 3.0
"""Standard errors from one half at which it is told that one side is longer: by chance once in 370 clean sets."""


@dataclass(frozen=True)
class Finding:
    """One kind of fault, and the records that have it."""

    check: str
    text: str
    places: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"check": self.check, "text": self.text, "count": len(self.places), "places": list(self.places)}


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, as texts."""

    place: str
    prompt: str
    chosen: str
    rejected: str


@dataclass
class Linted:
    """What a set of files holds, and what was found."""

    records: int = 0
    pairs: int = 0
    kinds: dict[str, float] = field(default_factory=dict)
    """Readable records by what people are paid for (conf/prices.yaml); plain texts are none of it."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def dollars(self) -> float:
        """What people would be paid for as many, at the planner's prices."""
        return float(sum(entry["dollars"] for entry in price_human_data(self.kinds).values()))

    def as_dict(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "pairs": self.pairs,
            "kinds": self.kinds,
            "dollars": self.dollars,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def lint_files(files: Sequence[str], renderer: Renderer | None = None) -> Linted:
    """Look at every record of the files.

    renderer: also render each record, and see whether its words come back out of the tokens that are learned.
    Errors: ConfigError for a file that cannot be read; where the files hold no record
    """
    linted = Linted()
    found: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    repeats = _Repeats()
    longer: list[int] = []
    answers = refusals = 0
    for place, value in (one for file in files for one in read_values(file)):
        linted.records += 1
        try:
            if isinstance(value, BadRecord):
                raise value
            if is_pair(value):
                pair = parse_pair(value, place)
                linted.pairs += 1
                kind = "comparison"
                longer.append((len(pair.chosen) > len(pair.rejected)) - (len(pair.chosen) < len(pair.rejected)))
                names = list(_check_pair(pair))
                if not {"chosen is rejected", "empty answer"} & set(names):  # what cannot be trained on is broken
                    sides = parse_pair_record(value, place)
                    if renderer is not None and not all(
                        _comes_back(r, renderer) for r in (sides.chosen, sides.rejected)
                    ):
                        names.append("words lost by the template")
                repeats.add(place, pair.prompt, f"{pair.chosen}\0{pair.rejected}")
            else:
                record = parse_record(value, place)
                kind = _kind_of(record)
                names = list(_check_record(record))
                if renderer is not None and not _comes_back(record, renderer):
                    names.append("words lost by the template")
                said = _answers(record)
                answers += len(said)
                refusals += sum(bool(REFUSAL.match(text)) for text in said)
                repeats.add(place, *_split(record))
            if kind:
                linted.kinds[kind] = linted.kinds.get(kind, 0) + 1
        except ConfigError as error:
            names = ["broken record"]
            reasons.setdefault("broken record", str(error).removeprefix(f"{place}: "))
        for name in names:
            found.setdefault(name, []).append(place)
    if not linted.records:
        raise ConfigError(f"{', '.join(files)}: no record is there.")
    found.update({name: places for name, places in repeats.found.items() if places})
    for name, text in TEXTS.items():
        places = found.get(name)
        if places:
            low, high = wilson_interval(len(places), linted.records)
            first = f"; the first: {reasons[name]}" if name in reasons else ""
            share = f"{len(places)} of {linted.records} ({len(places) / linted.records:.1%}, {low:.1%} to {high:.1%})"
            linted.findings.append(Finding(name, f"{share}: {text}{first}", tuple(places)))
    if refusals:
        text = f"{refusals} of {answers} answers ({refusals / answers:.1%}) begin by declining: is it what shall be learned?"
        linted.findings.append(Finding("refusals", text, tuple(found.get("_refusal", ()))))
    linted.findings += _compare_lengths(longer)
    return linted


TEXTS = {
    "broken record": "cannot be learned from",
    "repeated record": "the same words as an earlier record",
    "prompt with another answer": "a prompt that an earlier record answers otherwise",
    "empty turn": "a message without words",
    "roles out of order": "two messages of one speaker in a row, a system message that is not first, or the assistant first",
    "last word not the assistant's": "what follows the last answer is read and never learned from",
    "unclosed code": "an answer opens a block of code (```) and does not close it",
    "chosen is rejected": "both answers are the same: there is nothing to prefer",
    "empty answer": "an answer of the pair has no words",
    "words lost by the template": "the tokens that are learned do not hold what the assistant says",
}
"""Each kind of fault of single records, in the order of the report."""


def parse_pair(value: Mapping[str, Any], place: str) -> Pair:
    """Parse the pair that a JSON value is: prompt, chosen and rejected, texts or lists of messages; or two conversations.

    Errors: ConfigError
    """
    sides = [value.get("chosen"), value.get("rejected")]
    if all(isinstance(side, str) for side in sides):
        prompt = value.get("prompt")
        if prompt is None:
            raise ConfigError(f"{place}: two answers as texts need a prompt.")
        return Pair(place, _as_text(prompt, place), *(_as_text(side, place) for side in sides))
    if not all(isinstance(side, list) for side in sides):
        raise ConfigError(f"{place}: chosen and rejected must both be texts, or both lists of messages.")
    better, worse = (list(side) for side in sides if isinstance(side, list))
    shared = 0
    if value.get("prompt") is None:
        while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
            shared += 1
    prompt = better[:shared] if value.get("prompt") is None else value["prompt"]
    return Pair(place, _as_text(prompt, place), _as_text(better[shared:], place), _as_text(worse[shared:], place))


def _as_text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
        return "\n".join(message["content"] for message in value)
    raise ConfigError(f"{place}: a prompt or an answer is {type(value).__name__}: give a text, or a list of messages.")


# ------------------------------------------------------------------------------------------------------------ single records
def _answers(record: Record) -> list[str]:
    if record.messages:
        return [m["content"] for m in record.messages if m["role"] == "assistant"]
    return [record.completion] if record.completion is not None else []


def _kind_of(record: Record) -> str:
    """The entry of the planner's prices that a record is; empty for a plain text."""
    answers = len(_answers(record))
    return "multi_turn_chat" if answers > 1 else "instruction_pair" if answers else ""


def _split(record: Record) -> tuple[str, str]:
    """Split what is asked, and what is answered last."""
    if record.messages:
        said = [f"{m['role']}: {m['content']}" for m in record.messages]
        return "\n".join(said[:-1]), said[-1]
    return record.prompt or "", record.completion if record.completion is not None else record.text or ""


def _check_record(record: Record) -> Iterator[str]:
    roles = [message["role"] for message in record.messages]
    if any(not message["content"].strip() for message in record.messages):
        yield "empty turn"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    pairs = zip(turns, turns[1:], strict=False)
    # A tool may answer several calls at once, and the assistant may call after it has spoken.
    if "system" in turns or turns[:1] == ["assistant"] or any(a == b != "tool" for a, b in pairs):
        yield "roles out of order"
    if roles and roles[-1] != "assistant":
        yield "last word not the assistant's"
    answers = _answers(record)
    if any(_leaves_code_open(text) for text in answers):
        yield "unclosed code"
    if any(REFUSAL.match(text) for text in answers):
        yield "_refusal"


def _check_pair(pair: Pair) -> Iterator[str]:
    if pair.chosen.split() == pair.rejected.split():
        yield "chosen is rejected"
    if not pair.chosen.strip() or not pair.rejected.strip():
        yield "empty answer"
    if _leaves_code_open(pair.chosen):
        yield "unclosed code"


def _leaves_code_open(text: str) -> bool:
    return sum(line.lstrip().startswith("```") for line in text.splitlines()) % 2 == 1


def _comes_back(record: Record, renderer: Renderer) -> bool:
    """Whether the tokens that are learned hold the words. Errors: BadRecord where the record cannot be rendered"""
    rendered = renderer.render(record)
    learned = renderer.tokenizer.decode(rendered.ids[rendered.weights > 0].tolist())
    counted: Iterable[str] = _answers(record)
    if record.messages:
        pairs = zip(record.messages, record.weights, strict=True)
        counted = (message["content"] for message, weight in pairs if weight)
    return all(text.strip() in learned for text in counted)


# ------------------------------------------------------------------------------------------------------------------ the whole
class _Repeats:
    """Knows earlier records by a digest, so that a large set needs few bytes for each."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {"repeated record": [], "prompt with another answer": []}
        self._seen: set[bytes] = set()
        self._prompts: set[bytes] = set()

    def add(self, place: str, prompt: str, answer: str) -> None:
        """Compare a record with the earlier ones, blanks left aside; a record without a prompt is a text."""
        asked, whole = self._digest(prompt), self._digest(prompt, answer)
        if whole in self._seen:
            self.found["repeated record"].append(place)
        elif prompt.strip() and asked in self._prompts:
            self.found["prompt with another answer"].append(place)
        self._seen.add(whole)
        self._prompts.add(asked)

    @staticmethod
    def _digest(*texts: str) -> bytes:
        normal = json.dumps([" ".join(text.split()) for text in texts])
        return hashlib.blake2b(normal.encode(), digest_size=16).digest()


def _compare_lengths(longer: Sequence[int]) -> Iterator[Finding]:
    """Tell where the better answer is the longer one, or the shorter, too often to be chance: that is what would be learned."""
    above, count = sum(sign > 0 for sign in longer), sum(sign != 0 for sign in longer)
    if count and abs(above / count - 0.5) > DEVIATIONS * math.sqrt(0.25 / count):
        low, high = wilson_interval(above, count)
        text = f"the chosen answer is the longer one in {above / count:.0%} of {count} pairs ({low:.0%} to {high:.0%})"
        yield Finding("length decides", f"{text}: length alone would be learned")
