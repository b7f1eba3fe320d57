"""Token files beside Megatron core's own reader and writer, where it is installed."""

import warnings

import numpy as np
import pytest

from megalm.data.tokens import TokenFile, TokenWriter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core.datasets.indexed_dataset")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_they_read_our_files_and_we_theirs(tmp_path, dtype):
    rng = np.random.default_rng(5)
    with TokenWriter(str(tmp_path / "ours"), np.dtype(dtype)) as writer:
        for _ in range(30):
            writer.add_document(rng.integers(2, 50000, int(rng.integers(1, 90))).astype(dtype))
    ours, theirs = TokenFile(str(tmp_path / "ours")), IndexedDataset(str(tmp_path / "ours"))
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
