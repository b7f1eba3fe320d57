"""A model that judges two answers: any OpenAI-compatible endpoint, asked in both orders, each answer of it kept.

A win counts only where both orders say the same; the rest are ties, and the share of pairs whose winner changes with the order
is reported (the flip rate). The judge itself is tried first: an answer against itself, against nothing, and against its own words
shuffled.

Source: Zheng et al. 2023 (arXiv:2306.05685)
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.writing import explain_failed_writes
from megalm.evaluate.pairs import Pair
from megalm.evaluate.statistics import wilson_interval
from megalm.evaluate.strengths import Strengths, Vote, fit_strengths

QUESTION = """Two assistants answered the same question. Decide which answer serves the person who asked better: is it right, \
does it answer what was asked, is it complete and clear? Do not reward length; do not mind the order of the answers.

[Question]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Explain in a few sentences, then end with a line that holds only [[A]], [[B]], or [[C]] for answers that are equally good."""
VERDICT = re.compile(r"\[\[([ABC])\]\]")
TRIES = 5
"""Of a request; between them 1, 2, 4, 8 seconds."""
MOST_TRIED = 20
"""Answers that the judge itself is tried with."""


@dataclass
class Judge:
    """Asks an endpoint, and keeps what it said by what it was asked: the same question is not paid for twice.

    url: as https://host/v1; the key, where it needs one, is read from the environment variable `key`.
    """

    url: str
    model: str
    store: Path
    key: str = "OPENAI_API_KEY"
    pause: float = 1.0
    """Seconds before the second try."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    asked: int = 0
    """Requests that were sent now, with their tokens above; not those that were kept from before."""
    _known: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.store.exists():
            text = self.store.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                with self.store.open("a", encoding="utf-8") as file:
                    file.write("\n")  # what follows a line that was cut off stands on its own
            for line in text.splitlines():
                try:
                    kept = json.loads(line)
                    self._known[kept["hash"]] = kept["text"]
                except (ValueError, KeyError):
                    continue  # the line that a crash cut off: asked again

    def ask(self, text: str) -> str:
        """Its answer. Errors: ConfigError where the endpoint stays away or refuses; what was kept stays"""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 512,
        }
        name = hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()
        if name in self._known:
            return self._known[name]
        reply = self._send(body)
        try:
            answer = str(reply["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"{self.url}: this is no answer of a chat endpoint: {json.dumps(reply)[:200]}") from None
        usage = reply.get("usage") or {}
        with self._lock, explain_failed_writes(self.store.parent, key="--output"):
            self.asked += 1
            self.prompt_tokens += int(usage.get("prompt_tokens") or 0)
            self.completion_tokens += int(usage.get("completion_tokens") or 0)
            self._known[name] = answer
            with self.store.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"hash": name, "text": answer, "request": body}) + "\n")
        return answer

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self.key):
            headers["Authorization"] = f"Bearer {secret}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        why = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=300) as reply:
                    return dict(json.loads(reply.read()))
            except urllib.error.HTTPError as error:
                why = f"{error.code}: {error.read()[:200].decode(errors='replace')}"
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, ValueError, TypeError) as error:
                why = str(error)
        raise ConfigError(
            f"{self.url}: the judge does not answer ({why}). {len(self._known)} answers are kept in {self.store}; the same "
            "command goes on from there."
        )


def read_verdict(text: str) -> str | None:
    """Read a, B, or C for neither: the last verdict of an answer; None where it has none."""
    found = VERDICT.findall(text)
    return found[-1] if found else None


@dataclass(frozen=True)
class Judged:
    """Both orders of one pair."""

    pair: Pair
    outcome: float
    """1.0 left, 0.0 right, 0.5 where the orders differ or the judge says neither."""
    flipped: bool
    """The first, or the second, answer won in both orders."""
    unread: int
    """Of two answers, those without a verdict."""


def judge_pair(pair: Pair, ask: Callable[[str], str]) -> Judged:
    """Ask in both orders."""
    texts = (pair.left_text, pair.right_text)
    said = []
    for first, second in (texts, texts[::-1]):
        said.append(read_verdict(ask(QUESTION.format(prompt=pair.prompt, first=first, second=second))))
    values = {"A": (1.0, 0.0), "B": (0.0, 1.0)}
    left = [values.get(verdict or "C", (0.5, 0.5))[turned] for turned, verdict in enumerate(said)]
    agreed = left[0] == left[1] and left[0] != 0.5
    flipped = {left[0], left[1]} == {0.0, 1.0}
    return Judged(pair, left[0] if agreed else 0.5, flipped, said.count(None))


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of two models, and what its own trial says of the judge."""

    models: tuple[str, str]
    wins: tuple[int, int]
    ties: int
    interval: tuple[float, float]
    flip_rate: float
    unread: int
    trial: dict[str, float]
    """Share right: `itself` (no winner), `empty` and `shuffled` (the answer itself wins)."""
    longer_won: float | None
    """Share of decided pairs that the longer answer won."""
    strengths: Strengths

    def as_dict(self) -> dict[str, Any]:
        named = {
            name: getattr(self, name) for name in ("models", "wins", "ties", "interval", "flip_rate", "unread", "trial")
        }
        values = dict(zip(self.strengths.models, self.strengths.values.tolist(), strict=True))
        return {**named, "longer_won": self.longer_won, "strengths": values, "style": self.strengths.style}


def judge_pairs(pairs: Sequence[Pair], judge: Judge, *, workers: int = 4, bootstrap: int = 1000) -> Verdicts:
    """Try the judge, then let it judge every pair of the two models once (no repeats, none that is planted).

    Errors: ConfigError where the endpoint stays away, or there is no pair
    """
    asked = [p for p in pairs if p.repeats is None and "shuffled" not in (p.left, p.right)]
    names = sorted({name for pair in asked for name in (pair.left, pair.right)})
    if len(names) != 2:
        raise ConfigError(f"the pairs are of {len(names)} models; a judge compares two")
    with ThreadPoolExecutor(workers) as pool:
        tried = list(pool.map(lambda pair: judge_pair(pair, judge.ask), _trial(asked)))
        found = list(pool.map(lambda pair: judge_pair(pair, judge.ask), asked))
    trial: dict[str, list[bool]] = {"itself": [], "empty": [], "shuffled": []}
    for one in tried:
        trial[one.pair.right].append(one.outcome == (0.5 if one.pair.right == "itself" else 1.0) and not one.flipped)
    share = [one.outcome if one.pair.left == names[0] else 1 - one.outcome for one in found]
    votes = [Vote(o.pair.left, o.pair.right, o.outcome, o.pair.left_text, o.pair.right_text) for o in found]
    decided = [
        (one.outcome == 1.0) == (len(one.pair.left_text) > len(one.pair.right_text))
        for one in found
        if one.outcome != 0.5 and len(one.pair.left_text) != len(one.pair.right_text)
    ]
    return Verdicts(
        models=(names[0], names[1]),
        wins=(share.count(1.0), share.count(0.0)),
        ties=share.count(0.5),
        interval=wilson_interval(sum(share), len(share)),
        flip_rate=sum(one.flipped for one in found) / len(found),
        unread=sum(one.unread for one in found),
        trial={name: sum(right) / len(right) for name, right in trial.items() if right},
        longer_won=sum(decided) / len(decided) if decided else None,
        strengths=fit_strengths(votes, style=True, bootstrap=bootstrap),
    )


def _trial(pairs: Sequence[Pair]) -> list[Pair]:
    rng = random.Random(0)
    made = []
    for pair in pairs[:MOST_TRIED]:
        words = pair.left_text.split()
        rng.shuffle(words)
        for name, text in (("itself", pair.left_text), ("empty", ""), ("shuffled", " ".join(words))):
            if name == "itself" or (len(words) > 3 and text != pair.left_text):
                made.append(Pair(f"{pair.id}-{name}", pair.prompt, pair.left, name, pair.left_text, text))
    return made
