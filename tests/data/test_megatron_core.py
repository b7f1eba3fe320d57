"""Token files and sample order beside Megatron core itself, where it is installed."""

import logging
import warnings

import numpy as np
import pytest
import torch.distributed as dist

from megalm.config.data import DataConfig
from megalm.data.megatron_order import MegatronStream, open_megatron_sources
from megalm.data.tokens import TokenFile, TokenWriter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core.datasets.helpers_cpp")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


class Tokenizer:
    """What their data sets ask of one."""

    eod, pad, vocab_size = 0, 1, 60000
    unique_identifiers = {"class": "none"}


@pytest.fixture
def alone(tmp_path):
    """Their builders ask for a rank; this process is the only one."""
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    logging.disable(logging.NOTSET)


def write(prefix, rng, documents, dtype=np.uint16, longest=90):
    with TokenWriter(prefix, np.dtype(dtype)) as writer:
        for _ in range(documents):
            writer.add_document(rng.integers(2, 50000, int(rng.integers(1, longest))).astype(dtype))
    return prefix


CASES = {
    # of documents, sources, weights, split, samples as a share of all
    "a part of one epoch": ([800], None, "969,30,1", 0.4),
    "several epochs, the last one mostly used": ([60], None, "1,0,0", 3.9),
    "several epochs, the last one kept apart": ([60], None, "80,20,0", 3.3),
    "two sources": ([90, 40], [0.7, 0.3], "0.7,0.2,0.1", 0.9),
    "weights that are no shares, more than is there": ([70, 120, 50, 45], [17.0, 3.0, 60.0, 1.0], "80,20,0", 2.5),
    "equal thirds": ([50, 50, 50], [1 / 3, 1 / 3, 1 / 3], "1,0,0", 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_every_sample_of_the_order_has_the_same_tokens(tmp_path, alone, name):
    documents, weights, split, share = CASES[name]
    rng = np.random.default_rng(len(name))
    prefixes = [write(str(tmp_path / f"source{i}"), rng, count) for i, count in enumerate(documents)]
    length, seed = int(rng.integers(3, 40)), int(rng.integers(0, 100_000))
    wanted = int(share * sum(TokenFile(prefix).num_tokens for prefix in prefixes) / length)
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=length, blend=(prefixes, weights), split=split, tokenizer=Tokenizer(),
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [wanted, 1, 0], lambda: True, config).build()[0]
    data = DataConfig(train=prefixes, weights=weights, split=split, order="megatron")
    sources = open_megatron_sources(data, length, wanted, seed)
    order = MegatronStream(sources, wanted).samples(np.arange(wanted))
    for position in range(wanted):
        sample = theirs[position]
        tokens = [*sample["tokens"].tolist(), sample["labels"][-1].item()]
        assert sources[order.source[position]].read(int(order.index[position])).tolist() == tokens, position


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_they_read_our_files_and_we_theirs(tmp_path, dtype):
    rng = np.random.default_rng(5)
    ours = TokenFile(write(str(tmp_path / "ours"), rng, 30, dtype))
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == ours.num_sequences == 30
    assert theirs.document_indices.tolist() == ours.documents.tolist()
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for i in range(30):
        assert theirs[i].dtype == dtype
        assert theirs[i].tolist() == ours.read(ours.document_start(i), ours.document_start(i) + len(theirs[i])).tolist()
        builder.add_document(theirs[i].astype(np.int64), [len(theirs[i])])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"theirs.{ending}").read_bytes() == (tmp_path / f"ours.{ending}").read_bytes()
