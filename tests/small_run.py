"""A small token file with something to learn in it, for tests that train."""

from pathlib import Path

import numpy as np

from megalm.data.tokens import TokenWriter


def write_corpus(folder: Path, *, vocab_size: int = 64, documents: int = 120, length: int = 300) -> str:
    """Documents of noisy counting; returns the prefix for `data.train`."""
    prefix = folder / "numbers_text_document"
    random = np.random.RandomState(7)
    with TokenWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            counted = np.arange(length) + random.randint(vocab_size)
            noise = random.randint(0, vocab_size, length) * (random.rand(length) < 0.1)
            writer.add_document(((counted + noise) % vocab_size).astype(np.uint16))
    return str(prefix)


def small_run(folder: Path, *overrides: str) -> list[str]:
    """Overrides of a run that takes a fraction of a second a step."""
    return [
        "+model=tiny",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "model.vocab_size=64",
        "model.seq_length=32",
        "train.steps=6",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.eval_every=3",
        "train.eval_sequences=4",
        "optim.lr=1e-2",
        "optim.min_lr=1e-3",
        "optim.warmup_steps=2",
        "checkpoint.every=3",
        "data.tokenizer=null",
        "device=cpu",
        f"data.train=[{write_corpus(folder)}]",
        f"run.dir={folder}/runs",
        "run.name=small",
        *overrides,
    ]
