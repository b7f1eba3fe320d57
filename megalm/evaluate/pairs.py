"""Two models' answers for people to compare: blinded, in random order, some repeated or planted; and what the votes say."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.writing import explain_failed_writes, write_whole
from megalm.evaluate.statistics import wilson_interval
from megalm.evaluate.strengths import Strengths, Vote, fit_strengths

PAGE = Path(__file__).parent / "vote_page.html"
REPEATED = 0.10
"""Share of pairs that come a second time, turned around: whether a person agrees with themselves."""
PLANTED = 0.05
"""Share of pairs in which one side's words are shuffled: whether they are read."""
KEY, SHOWN, VOTES = "key.jsonl", "vote.html", ("left", "right", "tie")


@dataclass(frozen=True)
class Pair:
    """One comparison as a person sees it, and what they are not shown."""

    id: str
    prompt: str
    left: str
    right: str
    """Names of the models; `shuffled` for a planted side."""
    left_text: str
    right_text: str
    repeats: str | None = None
    """The pair that this one is, turned around."""


def make_pairs(
    prompts: Sequence[str], first: Mapping[str, str], second: Mapping[str, str], names: tuple[str, str], seed: int = 0
) -> list[Pair]:
    """Make pairs of two models' answers by prompt, in an order that the seed decides.

    Shapes: one pair a prompt, REPEATED of them twice, PLANTED of them more with one side shuffled
    """
    rng = random.Random(seed)
    sides = [[(names[0], first[p]), (names[1], second[p])] for p in prompts]
    made: list[Pair] = []

    def add(prompt: str, left: tuple[str, str], right: tuple[str, str], repeats: str | None = None) -> None:
        made.append(Pair(f"{rng.getrandbits(64):016x}", prompt, left[0], right[0], left[1], right[1], repeats))

    for prompt, (one, other) in zip(prompts, sides, strict=True):
        add(prompt, *((one, other) if rng.random() < 0.5 else (other, one)))
    for pair in rng.sample(made, max(1, round(REPEATED * len(prompts)))):
        add(pair.prompt, (pair.right, pair.right_text), (pair.left, pair.left_text), pair.id)
    long = [n for n, prompt in enumerate(prompts) if len(set(first[prompt].split())) > 3]
    for number in rng.sample(long, min(len(long), max(1, round(PLANTED * len(prompts))))):
        words = sides[number][0][1].split()
        rng.shuffle(words)
        both = [sides[number][0], ("shuffled", " ".join(words))]
        rng.shuffle(both)
        add(prompts[number], both[0], both[1])
    rng.shuffle(made)
    return made


def write_pairs(folder: Path, pairs: Sequence[Pair]) -> None:
    """key.jsonl, which says who wrote what and is not for those who vote; vote.html, which needs nothing beside it."""
    shown = [{"id": p.id, "prompt": p.prompt, "left": p.left_text, "right": p.right_text} for p in pairs]
    data = json.dumps(shown).replace("<", "\\u003c")  # so that no answer can end the script
    with explain_failed_writes(folder, key="--output"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / KEY, "".join(json.dumps(vars(pair)) + "\n" for pair in pairs))
        write_whole(folder / SHOWN, PAGE.read_text(encoding="utf-8").replace("{{PAIRS}}", data))


def read_pairs(folder: Path) -> dict[str, Pair]:
    """Read the key of a folder, by id. Errors: ConfigError where there is none"""
    try:
        lines = (folder / KEY).read_text(encoding="utf-8").splitlines()
        return {(pair := Pair(**json.loads(line))).id: pair for line in lines}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder / KEY}: is no key of pairs ({error}); megalm evaluate pairs writes it") from None


def read_votes(path: Path, pairs: Mapping[str, Pair]) -> dict[str, str]:
    """Read a person's votes by pair. Errors: ConfigError that names the vote that is none"""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        votes = dict(content["votes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: is no file of votes ({type(error).__name__}); the page's button saves one"
        ) from None
    for name, vote in votes.items():
        if name not in pairs or vote not in VOTES:
            raise ConfigError(
                f"{path}: {name}: {vote!r}: " + ("a vote is left, right or tie" if name in pairs else "no such pair")
            )
    return votes


@dataclass(frozen=True)
class Tally:
    """What people said."""

    models: tuple[str, str]
    wins: tuple[float, float]
    ties: int
    interval: tuple[float, float]
    """95% interval of the first model's share, ties half."""
    agreement: float | None
    """Share of repeated pairs on which a person said the same; None where none was voted on twice."""
    attentive: float | None
    """Share of planted pairs on which the shuffled side lost."""
    kappa: float | None
    """Agreement of two people beyond chance (Cohen), mean over pairs of people; None for one person."""
    strengths: Strengths

    def as_dict(self) -> dict[str, Any]:
        share = (self.wins[0] + self.ties / 2) / max(1.0, sum(self.wins) + self.ties)
        return {
            "models": self.models,
            "wins": self.wins,
            "ties": self.ties,
            "share": share,
            "interval": self.interval,
            "self_agreement": self.agreement,
            "attentive": self.attentive,
            "kappa": self.kappa,
            "style": self.strengths.style,
            "strengths": dict(zip(self.strengths.models, self.strengths.values.tolist(), strict=True)),
        }


def tally(pairs: Mapping[str, Pair], people: Sequence[Mapping[str, str]], *, bootstrap: int = 1000) -> Tally:
    """Count votes. Repeated pairs and planted ones check the people, and count for no model.

    Errors: ConfigError without a vote on a pair of the two models
    """
    names = sorted({n for p in pairs.values() for n in (p.left, p.right)} - {"shuffled"})
    votes, same, attentive = [], [], []
    for person in people:
        for name, vote in person.items():
            pair = pairs[name]
            if "shuffled" in (pair.left, pair.right):
                attentive.append(vote == ("right" if pair.left == "shuffled" else "left"))
            elif pair.repeats is not None:
                if pair.repeats in person:
                    same.append(person[pair.repeats] == {"left": "right", "right": "left", "tie": "tie"}[vote])
            else:
                outcome = {"left": 1.0, "right": 0.0, "tie": 0.5}[vote]
                votes.append(Vote(pair.left, pair.right, outcome, pair.left_text, pair.right_text))
    if not votes or len(names) != 2:
        raise ConfigError("there are no votes on pairs of two models")
    share = [vote.outcome if vote.left == names[0] else 1 - vote.outcome for vote in votes]
    return Tally(
        models=(names[0], names[1]),
        wins=(float(share.count(1.0)), float(share.count(0.0))),
        ties=share.count(0.5),
        interval=wilson_interval(sum(share), len(share)),
        agreement=sum(same) / len(same) if same else None,
        attentive=sum(attentive) / len(attentive) if attentive else None,
        kappa=_mean_kappa(people),
        strengths=fit_strengths(votes, style=True, bootstrap=bootstrap),
    )


def _mean_kappa(people: Sequence[Mapping[str, str]]) -> float | None:
    found = []
    for number, first in enumerate(people):
        for second in people[number + 1 :]:
            shared = [name for name in first if name in second]
            if not shared:
                continue
            agree = sum(first[n] == second[n] for n in shared) / len(shared)
            chance = sum(
                (sum(first[n] == v for n in shared) / len(shared)) * (sum(second[n] == v for n in shared) / len(shared))
                for v in VOTES
            )
            found.append((agree - chance) / (1 - chance) if chance < 1 else 1.0)
    return sum(found) / len(found) if found else None
