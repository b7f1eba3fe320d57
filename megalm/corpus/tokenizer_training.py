"""Training a byte-level BPE on the text that it is to encode."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.corpus.documents import BadDocument, Piece, read_piece

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of text
TRAINING_MEGABYTES = 24.0  # more text changes the merges of a vocabulary of 8,192 hardly, and takes longer


def sample_texts(pieces: Sequence[Piece], field: str, megabytes: float) -> Iterator[str]:
    """Text from all pieces alike, up to this size in all."""
    budget = int(megabytes * 1e6)
    each = max(budget // max(len(pieces), 1), 1 << 16)
    for piece in pieces:
        taken = 0
        for document in read_piece(piece, field):
            if isinstance(document, BadDocument):
                continue
            text = document.text[: each - taken]
            taken += len(text)
            yield text
            if taken >= each:
                break
        budget -= taken
        if budget <= 0:
            return


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> int:
    """Trains on the texts, writes a tokenizer.json at `path`, and returns the size that the vocabulary reached.

    Splitting is GPT-2's; the only control token is `<|endoftext|>`, number 0; every byte can be encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"a byte-level vocabulary of {vocab_size} is too small: the bytes and the end of text take "
            f"{SMALLEST_VOCABULARY}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = f"{os.fspath(path)}.partial"
    Path(partial).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")  # `save` takes UTF-8 names only
    os.replace(partial, path)
    return tokenizer.get_vocab_size()
