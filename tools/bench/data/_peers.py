"""The other ways of doing the data work, for `tools/bench data`: each does the same job on the same input.

Run as a program, it tokenizes as Megatron's preprocessing does: a process pool around Hugging Face `tokenizers`, one
document a call.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class _Encoder:
    tokenizer: Any = None

    def __init__(self, path: str):
        self.path = path

    def initialize(self) -> None:
        from tokenizers import Tokenizer

        from megalm.tokenizer.plain_text import make_plain_text_config

        config = make_plain_text_config(json.loads(Path(self.path).read_text(encoding="utf-8")))
        _Encoder.tokenizer = Tokenizer.from_str(json.dumps(config))
        _Encoder.tokenizer.encode_special_tokens = True  # what looks like one in a text is text on both sides

    def encode(self, line: str) -> list[int]:
        return [*_Encoder.tokenizer.encode(json.loads(line)["text"]).ids, 0]


def tokenize_one_document_a_call(source: str, tokenizer: str, prefix: str, workers: int) -> None:
    """The pool, the calls and the writing of Megatron's tools/preprocess_data.py (as of its version 0.12)."""
    from megalm.data.tokens import TokenWriter

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = _Encoder(tokenizer)
    pool = multiprocessing.Pool(workers, initializer=encoder.initialize)
    with open(source, encoding="utf-8") as lines, TokenWriter(prefix, np.uint16) as writer, pool:
        for ids in pool.imap(encoder.encode, lines, 32):
            if len(ids) > 1:
                writer.add_document(np.array(ids, np.uint16))


class MegatronStyleMap:
    """A map-style data set with document, sample and shuffle index, read piece by piece from a memory map."""

    def __init__(self, prefix: str, seq_length: int):
        from megalm.data.megatron_order import SampleIndex
        from megalm.data.tokens import TokenFile

        self.file = TokenFile(prefix)
        self.index = SampleIndex(
            self.file.lengths, 0, self.file.num_sequences, self.file.num_tokens // seq_length - 1, seq_length, 1
        )
        self.pointers = np.asarray(self.file.pointers)
        entries = [self.index.place(sample) for sample in range(self.index.size + 1)]
        self.samples = np.array(entries, np.int32)

    def __len__(self) -> int:
        return self.index.size

    def __getitem__(self, number: int) -> dict:
        import torch

        sample = self.index.shuffle[number]
        (first, offset), (last, end) = self.samples[sample], self.samples[sample + 1]
        itemsize = self.file.dtype.itemsize
        parts = []
        for entry in range(first, last + 1):
            sequence = self.index.documents[entry]
            start = offset if entry == first else 0
            stop = end + 1 if entry == last else self.file.lengths[sequence]
            position = int(self.pointers[sequence]) + int(start) * itemsize
            parts.append(np.frombuffer(self.file.tokens, self.file.dtype, int(stop - start), position))
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        return {"tokens": tokens[:-1].contiguous(), "labels": tokens[1:].contiguous()}


def open_megatron_style(prefix: str, folder: Path, seq_length: int, batch: int) -> Callable[[], int]:
    """Open an epoch of shuffled batches through torch's DataLoader; returns how many samples it gave."""
    from torch.utils.data import DataLoader

    loader: DataLoader = DataLoader(MegatronStyleMap(prefix, seq_length), batch_size=batch)  # type: ignore[arg-type]
    return lambda: sum(len(b["tokens"]) for b in loader)


def open_megatron_core(prefix: str, folder: Path, seq_length: int, batch: int) -> Callable[[], int]:
    """Open an epoch of Megatron core's own GPTDataset through torch's DataLoader, without masks and positions."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from torch.utils.data import DataLoader

    from megalm.data.tokens import TokenFile

    class Tokenizer:
        eod, pad, vocab_size = 0, -1, 1 << 16
        unique_identifiers: dict[str, str] = {}

    file = IndexedDataset(str(TokenFile(prefix).prefix))
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=seq_length, split="1", tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    whole = np.arange(len(file), dtype=np.int32)
    data = GPTDataset(file, prefix, whole, None, Split.train, config)
    loader: DataLoader = DataLoader(data, batch_size=batch)  # type: ignore[arg-type]
    return lambda: sum(len(b["tokens"]) for b in loader)


def open_litdata(prefix: str, folder: Path, seq_length: int, batch: int) -> Callable[[], int]:
    """Open the same tokens as litdata's chunks of tokens, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    from megalm.data.tokens import TokenFile

    place = folder / "litdata"
    if not place.exists():
        import torch

        file = TokenFile(prefix)
        writer = BinaryWriter(str(place), chunk_size=seq_length * 4096, item_loader=TokensLoader(seq_length))
        for number, document in enumerate(file):
            writer[number] = torch.from_numpy(document.astype(np.uint16))
        writer.done()
        writer.merge()
    data = StreamingDataset(str(place), item_loader=TokensLoader(seq_length), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(data, batch_size=batch, num_workers=0)
    return lambda: sum(len(b) for b in loader)


def open_mosaicml_streaming(prefix: str, folder: Path, seq_length: int, batch: int) -> Callable[[], int]:
    """Open the same tokens as MDS shards of samples, shuffled."""
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    from megalm.data.tokens import TokenFile

    place = folder / "mds"
    if not place.exists():
        file = TokenFile(prefix)
        with MDSWriter(out=str(place), columns={"tokens": f"ndarray:uint16:{seq_length}"}) as writer:
            for start in range(0, file.num_tokens - seq_length, seq_length):
                writer.write({"tokens": np.asarray(file.tokens[start : start + seq_length]).astype(np.uint16)})
    data = StreamingDataset(local=str(place), shuffle=True, batch_size=batch)
    loader = DataLoader(data, batch_size=batch)
    return lambda: sum(len(b["tokens"]) for b in loader)


def measure(function: Callable[[], int]) -> float:
    """Measure samples per second of processor time, all threads together."""
    start = time.process_time()
    count = function()
    return count / max(time.process_time() - start, 1e-9)


if __name__ == "__main__":
    tokenize_one_document_a_call(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
