"""Compressed files that are dealt out in blocks: the same documents, places and tokens, for any workers."""

import bz2
import gzip
import json
import lzma
import os
from dataclasses import replace

import pytest
import zstandard

from megalm.config.errors import ConfigError
from megalm.corpus import documents as module
from megalm.corpus import tokenize_corpus
from megalm.corpus.archives import unpack
from megalm.corpus.blocks import Blocks
from megalm.corpus.documents import BadDocument, Piece, cut_into_pieces, find_files, read_piece
from megalm.corpus.json_lines import read_lines
from megalm.corpus.tokenize_corpus import Settings
from megalm.corpus.tokenize_job import Job, run_job
from tests.texts import documents
from tools.dedup.__main__ import main as dedup

PACK = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def lines(count=300):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents(count)).encode()


def found(piece):
    return [(getattr(d, "text", None), d.place) for d in read_piece(piece)]


def dealt(path, size, folder):
    (piece,) = find_files([str(path)])
    blocks, out = Blocks(piece, size), []
    while (block := blocks.next(str(folder / f"{len(out)}"))) is not None:
        out.append(block)
    blocks.close()
    return piece, out


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST_PIECE", 3000)


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("size", [1, 5000, None])
def test_blocks_hold_the_lines_at_their_places(tmp_path, ending, size):
    (tmp_path / f"a.jsonl{ending}").write_bytes(PACK[ending](lines()[:-1]))
    whole, blocks = dealt(tmp_path / f"a.jsonl{ending}", size, tmp_path)
    assert sum((found(block) for block in blocks), []) == found(whole)
    assert len(blocks) == {1: 300, None: 1}.get(size, len(blocks)) and all(b.label == whole.path for b in blocks)
    assert sum(block.size for block in blocks) == os.path.getsize(whole.path)


@pytest.mark.parametrize("size", [1000, None])
def test_blocks_hold_the_parts_of_a_text(tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "TEXT_PIECE", 1000)
    monkeypatch.setattr(module, "LONGEST_TEXT", 2000)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"\xef\xbb\xbf" + "\n".join(documents(40)).encode()))
    whole, blocks = dealt(tmp_path / "a.txt.xz", size, tmp_path)
    blocks = [replace(block, size=os.path.getsize(block.path)) for block in blocks]
    assert sum((found(b) for piece in blocks for b in cut_into_pieces([piece])), []) == found(whole)
    assert len(found(whole)) > 5


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("cut", [0.3, 0.999])
def test_a_cut_file_keeps_the_lines_before(tmp_path, ending, cut):
    packed = PACK[ending](os.urandom(200_000).hex().encode() + b"\n" + lines(3000))
    packed = PACK[ending](lines(3000)) + packed[: int(len(packed) * cut)]
    (tmp_path / f"a.jsonl{ending}").write_bytes(packed)
    whole, blocks = dealt(tmp_path / f"a.jsonl{ending}", 20_000, tmp_path)
    *kept, (text, place) = found(whole)
    assert text is None and sum((found(block) for block in blocks), []) == [*kept, (text, place)]
    assert [text for text, _ in kept[:3000]] == documents(3000) and int(place.split()[1]) >= len(lines(3000))
    (piece,) = find_files([str(tmp_path / f"a.jsonl{ending}")])
    *batches, last = read_lines(piece, "text")
    assert sum(len(b.ends) + len(b.bad) for b in batches) == len(kept) and "is cut off" in last.bad[0][1].reason
    (only,) = (Blocks(piece).next(str(tmp_path / "whole")),)
    assert found(only) == kept


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_streams_may_be_padded_but_not_followed_by_anything_else(tmp_path, ending):
    packed = PACK[ending](b"one\n") + bytes(8) + PACK[ending](b"two\n") + bytes(4)
    for more, damaged in ((b"", False), (b"rubbish", True)):
        (tmp_path / f"a.txt{ending}").write_bytes(packed + more)
        (last,) = read_piece(Piece(str(tmp_path / f"a.txt{ending}"), 1))
        assert isinstance(last, BadDocument) == damaged
    with open(tmp_path / f"a.txt{ending}", "rb") as file:
        assert unpack(file, {".gz": "gzip", ".xz": "xz"}[ending]).read(8) == b"one\ntwo\n"


def tokens(prefix):
    return [open(f"{prefix}_text_document.{part}", "rb").read() for part in ("bin", "idx")]


@pytest.mark.parametrize("ending", [".jsonl.zst", ".txt.gz"])
def test_tokens_are_those_of_the_plain_file(tmp_path, tokenizer_file, small, monkeypatch, ending):
    if ending == ".txt.gz":
        monkeypatch.setattr(module, "TEXT_PIECE", 4000)
        monkeypatch.setattr(module, "LONGEST_TEXT", 8000)
    plain, packed = tmp_path / f"a{os.path.splitext(ending)[0]}", tmp_path / f"b{ending}"
    plain.write_bytes(lines())
    packed.write_bytes(PACK[os.path.splitext(ending)[1]](lines()))
    run_job(Job((str(plain),), str(tmp_path / "plain"), Settings(tokenizer_file)))
    for workers in (1, 2):
        outcome = run_job(Job((str(packed),), str(tmp_path / f"{workers}"), Settings(tokenizer_file), workers=workers))
        assert tokens(tmp_path / f"{workers}") == tokens(tmp_path / "plain") and outcome.documents > 10
        assert outcome.input_bytes == os.path.getsize(packed) and list(outcome.tallies) == [f"{packed}\t-"]


@pytest.mark.parametrize("most", [None, 100])
def test_an_interrupted_run_goes_on(tmp_path, tokenizer_file, small, monkeypatch, most):
    packed = tmp_path / "a.jsonl.zst"
    packed.write_bytes(PACK[".zst"](lines()))
    job = Job((str(packed),), str(tmp_path / "whole"), Settings(tokenizer_file), max_documents=most)
    run_job(job)
    made, real = [], tokenize_corpus.tokenize_shard

    def stopping(number, *rest):
        if number == 4 and len(made) == 4:
            raise KeyboardInterrupt
        made.append(number)
        return real(number, *rest)

    monkeypatch.setattr(tokenize_corpus, "tokenize_shard", stopping)
    job = Job((str(packed),), str(tmp_path / "two"), Settings(tokenizer_file), max_documents=most)
    with pytest.raises(KeyboardInterrupt):
        run_job(job)
    assert not list((tmp_path / "two.parts").glob("*.block*"))
    made.append(-1)
    assert run_job(job).documents == (most or 300)
    assert made[:6] == [0, 1, 2, 3, -1, 4] and tokens(tmp_path / "two") == tokens(tmp_path / "whole")


@pytest.mark.parametrize("kind", [["near"], ["exact"], ["substring", "--bytes", "60"]])
def test_deduplication_unpacks_what_is_large(tmp_path, small, kind, capsys):
    content = lines(80) + lines(40)
    for name, data in (("a.jsonl", content), ("b.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        results = ["--output", str(tmp_path / f"{name}.kept"), "--removed", str(tmp_path / f"{name}.gone")]
        assert dedup([*kind, str(tmp_path / name), *results, "--workers", "2"]) == 0
        assert not (tmp_path / f"{name}.kept.parts").exists()
    for part in ("kept", "gone"):
        a, b = ((tmp_path / f"{name}.{part}").read_text() for name in ("a.jsonl", "b.jsonl.gz"))
        assert a == b.replace("b.jsonl.gz", "a.jsonl") and a


def test_a_damaged_archive_is_an_error_or_a_listed_skip(tmp_path, tokenizer_file, small, capsys):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines())[:-100])
    (tmp_path / "b.jsonl").write_bytes(lines(3))
    inputs = (str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl"))
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz: byte \d+: the compressed file is cut off.*--skip-bad"):
        run_job(Job(inputs, str(tmp_path / "o"), Settings(tokenizer_file), workers=2))
    outcome = run_job(Job(inputs, str(tmp_path / "o"), Settings(tokenizer_file, skip_bad=True), workers=2))
    assert outcome.bad == 1 and 270 < outcome.documents < 303 and "a.jsonl.gz: byte" in outcome.listed[0]
    command = ["near", *inputs, "--removed", str(tmp_path / "gone"), "--workers", "2"]
    assert dedup(command) == 2 and "cut off" in capsys.readouterr().err
    assert dedup([*command, "--skip-bad"]) == 0
    assert "skipped as bad: 1" in capsys.readouterr().out and "cut off" in (tmp_path / "gone").read_text()


def test_a_damaged_row_group_costs_itself_only(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"{number} " * 50 for number in range(30)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    at = column.data_page_offset
    content[at : at + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(content)
    places = [d for piece in cut_into_pieces(find_files([str(tmp_path / "a.parquet")])) for d in read_piece(piece)]
    assert [d.text.split()[0] for d in places if not isinstance(d, BadDocument)] == [
        str(n) for n in (*range(10), *range(20, 30))
    ]
    (bad,) = [d for d in places if isinstance(d, BadDocument)]
    assert bad.place == "row 10" and "the rest of the row group is left out" in bad.reason
