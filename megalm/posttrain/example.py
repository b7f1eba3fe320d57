"""A small instruction set and verifiable arithmetic, made by a program: what `make chat` learns. Ours, the same for a seed."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTROL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
WORDS = (
    "apple",
    "bird",
    "cloud",
    "door",
    "east",
    "fish",
    "green",
    "hill",
    "ice",
    "jam",
    "kite",
    "lamp",
    "moon",
    "nest",
    "oak",
)
SECRETS = ("password", "key", "code", "address", "name")
OTHER = 60
"""Prompts of each of the other kinds, of which every second is held out."""
MISS = 5
"""By which a guess is off at most."""
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Example:
    """Where the files of an example lie."""

    tokenizer: Path
    texts: Path
    """Plain texts to pretrain on."""
    instructions: Path
    """Conversations to fine-tune on."""
    sums: Path
    """Prompts with their answers: 90 of the 100 sums of two digits."""
    others: Path
    """Prompts of the other kinds, so that they are not forgotten."""
    held_out: Path
    """The 10 other sums."""
    other_held_out: Path
    """And prompts of the other kinds that no run has seen."""


def add(draw: random.Random) -> tuple[str, str]:
    """A sum of two digits."""
    a, b = draw.randrange(10), draw.randrange(10)
    return f"{a}+{b}=", str(a + b)


def guess(draw: random.Random) -> tuple[str, str]:
    """A sum with a number for an answer that lies near it: what shows the form and the size of an answer, and not the rule."""
    question, answer = add(draw)
    return question, str(max(0, int(answer) + draw.randint(-MISS, MISS)))


def name_next_day(draw: random.Random) -> tuple[str, str]:
    """Name a date, and the one that follows."""
    date = datetime.date(2000, 1, 1) + datetime.timedelta(days=draw.randrange(9000))
    after = date + datetime.timedelta(days=1)
    if draw.random() < 0.5:
        return f"after {date:%d.%m.%Y}?", f"{after:%d.%m.%Y}"
    return f"after {DAYS[date.weekday()]}?", DAYS[after.weekday()]


def sort_digits(draw: random.Random) -> tuple[str, str]:
    """Digits to be sorted."""
    digits = [str(draw.randrange(10)) for _ in range(draw.randrange(3, 6))]
    return f"sort {' '.join(digits)}", " ".join(sorted(digits))


def copy_words(draw: random.Random) -> tuple[str, str]:
    """Words to be said again."""
    words = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 4)))
    return f"say {words}", words


def refuse(draw: random.Random) -> tuple[str, str]:
    """What is not told."""
    return f"what is your {draw.choice(SECRETS)}?", "I cannot tell."


OTHERS: Sequence[Callable[[random.Random], tuple[str, str]]] = (name_next_day, sort_digits, copy_words, refuse)


def count_on(draw: random.Random) -> str:
    """Count a text: numbers, days, words or digits in their order."""
    kind, start = draw.randrange(4), draw.randrange(90)
    if kind == 0:
        return " ".join(str(start + n) for n in range(draw.randrange(4, 12)))
    if kind == 1:
        return " ".join(DAYS[(start + n) % 7] for n in range(draw.randrange(3, 7)))
    if kind == 2:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(3, 8)))
    return " ".join(sorted(str(draw.randrange(10)) for _ in range(draw.randrange(4, 10))))


def write_example(folder: Path, *, seed: int = 0, instructions: int = 4000, guesses: float = 0.25) -> Example:
    """Write all files. guesses: the share of instructions that are sums with a guess for an answer."""
    draw = random.Random(seed)
    names = [field.name for field in fields(Example)]
    made = Example(*(folder / (name if name == "tokenizer" else f"{name}.jsonl") for name in names))
    write_byte_tokenizer(made.tokenizer)
    _write(made.texts, [{"text": count_on(draw)} for _ in range(2 * instructions)])
    pairs = [guess(draw) if draw.random() < guesses else draw.choice(OTHERS)(draw) for _ in range(instructions)]
    _write(made.instructions, [{"messages": _ask(question, answer)} for question, answer in pairs])
    sums = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
    draw.shuffle(sums)
    others = [kind(draw) for kind in OTHERS for _ in range(OTHER)]
    parts = ((made.held_out, sums[:10]), (made.sums, sums[10:]), (made.others, others[::2]))
    for path, part in (*parts, (made.other_held_out, others[1::2])):
        _write(path, [{"prompt": _ask(question), "answer": answer} for question, answer in part])
    return made


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of the 256 bytes and five control tokens, with its chat template: a digit is a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": CONTROL[0], "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _ask(question: str, answer: str | None = None) -> list[dict[str, str]]:
    said = [{"role": "user", "content": question}]
    return said if answer is None else [*said, {"role": "assistant", "content": answer}]


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
