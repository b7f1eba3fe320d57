"""A small set of pairs in which the better answer can be told, and a run that learns from it."""

import json
import random
from pathlib import Path

from megalm.posttrain.prepare import prepare
from tests.convert.chat_model import make_chat_model
from tests.small_run import small_run

WORDS = ["one", "two", "three", "four", "five", "six"]


def make_records(count: int = 64) -> list[dict]:
    """Asked to repeat words, the better answer does, the worse one says others."""
    chance = random.Random(3)
    records = []
    for _ in range(count):
        said = chance.sample(WORDS, chance.randint(1, 3))
        other = [word for word in WORDS if word not in said][: chance.randint(1, 2)]
        answers = {"chosen": said, "rejected": other}
        records.append({
            "prompt": [{"role": "user", "content": " ".join(said)}],
            **{name: [{"role": "assistant", "content": " ".join(words)}] for name, words in answers.items()},
        })  # fmt: skip
    return records


def write_pairs(folder: Path, count: int = 64) -> Path:
    """Prefix of the prepared pairs; the tokenizer is in the folder's `model`."""
    (folder / "model").mkdir()
    make_chat_model(folder / "model", "files")
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in make_records(count)))
    prepare([str(file)], str(folder / "model"), str(folder / "made"))
    return folder / "made"


def pair_run(folder: Path, prefix: Path, *words: str) -> list[str]:
    """Overrides of a run on these pairs."""
    return small_run(
        folder,
        "objective=dpo",
        "objective.preference.beta=0.5",
        "model.vocab_size=320",
        "model.seq_length=128",
        "data.packing=pairs",
        f"data.train=[{prefix}]",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.steps=11",
        "train.eval_every=0",
        "guard=off",
        *words,
    )
