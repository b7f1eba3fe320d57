import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.data.tokens import HEADER, MAGIC, TokenFile, TokenWriter, choose_token_dtype, resolve_prefix


def write(prefix, documents, dtype=np.uint16):
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    return prefix


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "x_text_document", [[1, 2, 3], [4], [5, 6, 7, 8, 9]])


def test_bytes_are_megatrons(pair):
    expected = MAGIC + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i", 3, 1, 5) + struct.pack("<3q", 0, 6, 8)
    expected += struct.pack("<4q", 0, 1, 2, 3)
    assert (pair.parent / "x_text_document.idx").read_bytes() == expected
    assert (pair.parent / "x_text_document.bin").read_bytes() == struct.pack("<9H", *range(1, 10))
    assert sorted(os.listdir(pair.parent)) == ["x_text_document.bin", "x_text_document.idx"]


def test_reads_documents_and_boundaries(pair):
    file = TokenFile(pair)
    assert (file.num_documents, file.num_sequences, file.num_tokens, file.dtype.itemsize) == (3, 3, 9, 2)
    assert [list(document) for document in file] == [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert [file.document_at(i) for i in range(9)] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    first, starts = file.document_starts(1, 6)
    assert (first, list(starts)) == (0, [3, 4])
    assert list(file.document_starts(4, 9)[1]) == []
    file.verify(10)


def test_several_sequences_in_a_document_and_modes(tmp_path):
    lengths, documents = np.array([2, 1, 3], "<i4"), np.array([0, 2, 3], "<i8")
    pointers = np.array([0, 8, 12], "<i8")
    index = HEADER.pack(MAGIC, 1, 4, 3, 3) + lengths.tobytes() + pointers.tobytes() + documents.tobytes() + bytes(3)
    (tmp_path / "m.idx").write_bytes(index)
    (tmp_path / "m.bin").write_bytes(np.arange(6, dtype="<i4").tobytes())
    file = TokenFile(tmp_path / "m.bin")
    assert [list(document) for document in file] == [[0, 1, 2], [3, 4, 5]]
    file.verify()


def test_dtype_follows_megatrons_bound():
    assert choose_token_dtype(65_499) == np.uint16 and choose_token_dtype(65_500) == np.int32


def test_prefix_may_leave_out_the_ending(pair):
    assert resolve_prefix(pair.parent / "x") == pair
    with pytest.raises(ConfigError, match=r"y\.idx or .*y_text_document\.idx"):
        resolve_prefix(pair.parent / "y")


@pytest.mark.parametrize("part", ["idx", "bin"])
def test_every_truncation_is_a_clear_error(pair, part):
    path = f"{pair}.{part}"
    whole = Path(path).read_bytes()
    for size in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:size])
        with pytest.raises(ConfigError, match=r"x_text_document\.(idx|bin)"):
            TokenFile(pair)


def test_every_flipped_bit_of_the_index_is_caught_or_verified(pair):
    whole = bytearray(Path(f"{pair}.idx").read_bytes())
    for byte in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[byte] ^= 1 << bit
            with open(f"{pair}.idx", "wb") as file:
                file.write(damaged)
            try:
                file = TokenFile(pair)
                file.verify(10)
            except ConfigError as error:
                assert "byte" in str(error)
            else:  # only the table of documents may go from one sound state to another (a document may be empty)
                assert byte >= HEADER.size + 12 * 3
                assert [token for document in file for token in document] == list(range(1, 10))


def test_verify_names_the_byte_of_a_foreign_token(pair):
    with pytest.raises(ConfigError, match=r"byte 16: .*token 9 \(document 2\).*vocabulary of 9"):
        TokenFile(pair).verify(9)


def test_nothing_under_the_final_name_before_the_end(tmp_path):
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "z", np.uint16) as writer:
        writer.add_document(np.array([1]))
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    writer = TokenWriter(tmp_path / "z", np.uint16)
    writer.add_document(np.array([1]))
    assert not os.path.exists(tmp_path / "z.bin") and not os.path.exists(tmp_path / "z.idx")
    writer.finish()
    assert TokenFile(tmp_path / "z").num_tokens == 1


def test_empty_documents_and_foreign_types_are_refused(tmp_path):
    with pytest.raises(ValueError), TokenWriter(tmp_path / "z", np.uint16) as writer:
        writer.add_document(np.array([], np.uint16))
    with pytest.raises(ConfigError, match="float16"):
        TokenWriter(tmp_path / "z", np.float16)


def test_opening_costs_the_same_at_100_gigabytes(tmp_path):
    """A sparse file: the reader must touch neither all tokens nor all of the index."""
    documents = 2_000_000
    tokens = 50_000_000_000
    each = tokens // documents
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(tokens * 2)
    with open(tmp_path / "big.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        file.write(np.full(documents, each, "<i4").tobytes())
        file.write((np.arange(documents, dtype="<i8") * each * 2).tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    best = min(_time(lambda: TokenFile(tmp_path / "big")) for _ in range(3))
    assert best < 0.05
    file = TokenFile(tmp_path / "big")
    assert file.document_at(tokens - 1) == documents - 1
    assert file.read(tokens - 10, tokens).shape == (10,)


def _time(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
