"""A small instruction set and verifiable arithmetic, made by a program: what `make chat` learns. Ours, the same for a seed."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Example:
    """Where the files of an example lie."""

    tokenizer: Path
    instructions: Path
    """Conversations to fine-tune on."""
    prompts: Path
    """Sums to be rewarded, with their answers."""
    held_out: Path
    """Sums that are in neither."""


def add(draw: random.Random) -> tuple[str, str]:
    """A sum of two digits."""
    a, b = draw.randrange(10), draw.randrange(10)
    return f"{a}+{b}=", str(a + b)


def guess(draw: random.Random) -> tuple[str, str]:
    """A sum with a number for an answer that need not be right: what shows the form of an answer, and not the rule."""
    question, _ = add(draw)
    return question, str(draw.randrange(19))


def name_next_day(draw: random.Random) -> tuple[str, str]:
    """A date, and the one that follows."""
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


def write_example(folder: Path, *, seed: int = 0, instructions: int = 4000, guesses: float = 0.25) -> Example:
    """Write tokenizer, instructions and prompts. guesses: the share of instructions that are sums with a guess for an answer."""
    draw = random.Random(seed)
    made = Example(
        folder / "tokenizer", folder / "instructions.jsonl", folder / "prompts.jsonl", folder / "held_out.jsonl"
    )
    write_byte_tokenizer(made.tokenizer)
    pairs = [guess(draw) if draw.random() < guesses else draw.choice(OTHERS)(draw) for _ in range(instructions)]
    _write(made.instructions, [{"messages": _ask(question, answer)} for question, answer in pairs])
    sums = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
    draw.shuffle(sums)
    for path, part in ((made.held_out, sums[:10]), (made.prompts, sums[10:])):
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
