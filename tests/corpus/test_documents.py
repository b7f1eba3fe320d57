import bz2
import gzip
import json
import lzma

import numpy as np
import pytest
import zstandard

from megalm.config.errors import ConfigError
from megalm.corpus import documents as module
from megalm.corpus.documents import BadDocument, cut_into_pieces, find_files, read_piece
from megalm.corpus.shards import check_unchanged
from tests.texts import documents


def read(inputs, field="text"):
    return [d for piece in cut_into_pieces(find_files([str(i) for i in inputs])) for d in read_piece(piece, field)]


def texts(inputs, field="text"):
    return [d.text for d in read(inputs, field)]


def jsonl(items):
    return "".join(json.dumps(item) + "\n" for item in items)


@pytest.fixture
def records():
    return [{"text": text, "lang": "en", "n": i} for i, text in enumerate(documents(40))]


def test_every_format_and_compression_gives_the_same_documents(tmp_path, records):
    expected = [record["text"] for record in records]
    lines = jsonl(records).encode()
    writers = {"": lines, ".gz": gzip.compress(lines), ".bz2": bz2.compress(lines), ".xz": lzma.compress(lines)}
    frames = zstandard.ZstdCompressor()
    writers[".zst"] = frames.compress(lines[:1000]) + frames.compress(lines[1000:])
    for ending, content in writers.items():
        (tmp_path / f"a.jsonl{ending}").write_bytes(content)
        assert texts([tmp_path / f"a.jsonl{ending}"]) == expected
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert texts([tmp_path / "a.json"]) == expected
    import csv

    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "lang", "n"])
        writer.writeheader()
        writer.writerows(records)
    assert texts([tmp_path / "a.csv"]) == expected


def test_parquet_and_arrow(tmp_path, records):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    for new in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        with new(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
        assert texts([tmp_path / "a.arrow"]) == [record["text"] for record in records]
    assert len(cut_into_pieces(find_files([str(tmp_path / "a.parquet")]))) == 6
    assert texts([tmp_path / "a.parquet"]) == [record["text"] for record in records]
    assert read([tmp_path / "a.parquet"])[20].place == "row 20"
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    (found,) = read([tmp_path / "a.parquet"])
    assert found.place == "row 0" and "cannot be read (Parquet magic bytes not found" in found.reason


@pytest.mark.parametrize("size", [1, 17, 100, 5000])
def test_cutting_a_file_loses_and_doubles_no_line(tmp_path, monkeypatch, records, size):
    (tmp_path / "a.jsonl").write_text(jsonl(records))
    monkeypatch.setattr(module, "SMALLEST_PIECE", size)
    assert texts([tmp_path / "a.jsonl"]) == [record["text"] for record in records]


def test_a_long_text_is_cut_at_line_ends(tmp_path, monkeypatch):
    content = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    assert texts([tmp_path / "a.txt"]) == [content]
    monkeypatch.setattr(module, "TEXT_PIECE", 1000)
    monkeypatch.setattr(module, "LONGEST_TEXT", 2000)
    for name in ("a.txt", "a.txt.gz"):
        parts = texts([tmp_path / name])
        assert len(parts) > 3 and "".join(parts) == content and all(part.endswith("\n") for part in parts)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_tables_are_unpacked_to_be_read_from_their_end(tmp_path, records, ending):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / f"{name}{ending}").write_bytes(pack((tmp_path / name).read_bytes()))
        assert texts([tmp_path / f"{name}{ending}"]) == [record["text"] for record in records]


def test_of_a_table_only_the_columns_that_are_asked_for_are_read(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "a", "meta": {"lang": "en", "n": 1}, "other": "x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (piece,) = cut_into_pieces(find_files([str(tmp_path / "a.parquet")]))
    (found,) = read_piece(piece, "text", ["meta.lang"])
    assert set(found.fields) == {"text", "meta"} and found.field("meta.lang") == "en"
    (found,) = read_piece(piece, "text")
    assert set(found.fields) == {"text", "meta", "other"}
    (found,) = read_piece(piece, "body", [])
    assert "there are: text, meta, other" in found.reason


def test_a_row_that_is_not_text_costs_itself_only(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\na\n\xff\nc\n")
    for name, place in (("a.parquet", "row 1"), ("a.csv", "line 3")):
        first, second, third = read([tmp_path / name])
        assert (first.text, third.text) == ("a", "c")
        assert isinstance(second, BadDocument) and second.place == place and "UTF-8" in second.reason


def test_offsets_of_a_damaged_table_are_not_followed(tmp_path):
    """Arrow files hold offsets into their texts; followed unchecked, these would end the interpreter."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.ipc

    offsets = np.array([0, 1, 1 << 30, 3], np.int32)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"abc")]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), pyarrow.schema({"text": pyarrow.string()})) as writer:
        writer.write_batch(pyarrow.record_batch({"text": column}))
    first, *others = read([tmp_path / "a.arrow"])
    assert first.text == "a" and len(others) == 2
    assert [(d.place, "cannot be read" in d.reason) for d in others] == [("row 1", True), ("row 2", True)]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_json_comes_value_by_value(tmp_path, monkeypatch, records, block):
    monkeypatch.setattr(module, "BLOCK", block)
    expected = [record["text"] for record in records]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text(jsonl(records))
    (tmp_path / "one.json").write_text(json.dumps({"text": "alone", "n": 12}))
    (tmp_path / "mixed.json").write_text('["x", 1, [2]] {"text": "y"}\n"z" [] 17')
    assert texts([tmp_path / "a.json"]) == texts([tmp_path / "lines.json"]) == expected
    assert texts([tmp_path / "one.json"]) == ["alone"]
    mixed = read([tmp_path / "mixed.json"])
    assert [getattr(d, "text", "bad") for d in mixed] == ["x", "bad", "bad", "y", "z", "bad"]


@pytest.mark.parametrize(
    "tail", ['{"text": oops}]', '{"text": "b"', '"b" "c"]', '"b"', "]]", '"\\ud8"]', '"' + "x" * 90]
)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_broken_json_keeps_what_came_before(tmp_path, monkeypatch, tail, block):
    monkeypatch.setattr(module, "BLOCK", block)
    (tmp_path / "a.json").write_text('[{"text": "a"}, ' + tail)
    found = read([tmp_path / "a.json"])
    assert found[0].text == "a" and isinstance(found[-1], BadDocument)
    assert "not JSON" in found[-1].reason and "the rest of the file is left out" in found[-1].reason


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    for name, content in (
        ("a.txt", "x"),
        ("a.jsonl", '{"text": "x"}\n'),
        ("a.json", '[{"text": "x"}]'),
        ("a.csv", "text\nx"),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert texts([tmp_path / name]) == ["x"]


def test_a_text_without_line_ends_is_cut_between_characters(tmp_path, monkeypatch):
    content = "aé日\U0001f600" * 1500 + "\n" + "b" * 3000
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    for name, value in (("TEXT_PIECE", 1001), ("LONGEST_TEXT", 2000), ("LONGEST_LINE", 50)):
        monkeypatch.setattr(module, name, value)
    plain = texts([tmp_path / "a.txt"])
    assert len(plain) > 10 and "".join(plain) == content
    assert texts([tmp_path / "a.txt.gz"]) == plain


def test_paths_into_records(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        jsonl([{"meta": {"t": {"x": "deep"}}, "a.b": "flat"}, {"meta": 3, "a.b": "flat"}])
    )
    assert texts([tmp_path / "a.jsonl"], "a.b") == ["flat", "flat"]
    first, second = read([tmp_path / "a.jsonl"], "{meta.t.x}-{a.b}")
    assert first.text == "deep-flat" and isinstance(second, BadDocument)


def test_urls(tmp_path):
    import fsspec

    with fsspec.open("memory://corpus/a.jsonl", "w") as file:
        file.write(jsonl([{"text": "far"}]))
    assert texts(["memory://corpus"]) == texts(["memory://corpus/*.jsonl"]) == ["far"]
    with pytest.raises(ConfigError, match="nowhere"):
        find_files(["nowhere://bucket/x"])


def test_fields_and_templates(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl([{"title": "T", "body": "{title}"}, {"title": "U", "body": 3}, "bare"]))
    assert [d.text for d in read([tmp_path / "a.jsonl"], "title")] == ["T", "U", "bare"]
    first, second, _ = read([tmp_path / "a.jsonl"], "{title}: {body}")
    assert first.text == "T: {title}"
    assert isinstance(second, BadDocument) and "'body' is int" in second.reason


def test_broken_lines_are_found_with_their_byte(tmp_path):
    good = b'{"text": "a"}\n'
    bad = [
        b'{"text": "b\n',
        b'{"text": "\xff"}\n',
        b"[1]\n",
        b'{"other": 1}\n',
        b'{"text": null}\n',
        b'{"text": "\\ud800"}\n',
    ]
    bad.append(b"[" * 100_000 + b"\n")
    (tmp_path / "a.jsonl").write_bytes(good + b"".join(line + good for line in bad))
    found = read([tmp_path / "a.jsonl"])
    assert [d.text for d in found if not isinstance(d, BadDocument)] == ["a"] * (len(bad) + 1)
    places, at = [], len(good)
    for line in bad:
        places.append(f"byte {at + (10 if b'xff' in repr(line).encode() else 0)}")
        at += len(line) + len(good)
    assert [d.place for d in found if isinstance(d, BadDocument)] == places


@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz", ".bz2"])
def test_damaged_archives_are_an_error(tmp_path, ending):
    content = jsonl({"text": text} for text in documents(50)).encode()
    pack = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
    }
    packed = pack[ending](content)
    for at in range(20, len(packed) - 20, len(packed) // 7):
        damaged = bytearray(packed)
        damaged[at] ^= 0x55
        (tmp_path / f"a.jsonl{ending}").write_bytes(damaged)
        *whole, last = read([tmp_path / f"a.jsonl{ending}"])
        assert [d.text for d in whole] == documents(50)[: len(whole)] and "damaged here or before" in last.reason
        assert int(last.place.split()[1]) >= sum(len(jsonl([{"text": d.text}])) for d in whole)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz", ".bz2"])
def test_truncated_archives_are_an_error_and_not_an_end(tmp_path, ending):
    content = jsonl({"text": text} for text in documents(50)).encode()
    pack = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
    }
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack[ending](content)[:-20])
    *whole, last = read([tmp_path / f"a.jsonl{ending}"])
    assert [d.text for d in whole] == documents(50)[: len(whole)]
    assert isinstance(last, BadDocument) and "cut off" in last.reason


def test_a_store_that_fails_in_its_own_way_is_explained(monkeypatch):
    """Libraries of object stores raise exceptions that are neither OSError nor ValueError: no credentials, no bucket."""
    fsspec = pytest.importorskip("fsspec")

    class NoCredentials(Exception):
        pass

    def refuse(url):
        raise NoCredentials("Unable to locate credentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(ConfigError, match="s3://bucket/a.jsonl.*Unable to locate credentials.*Check the address"):
        find_files(["s3://bucket/a.jsonl"])


def test_a_quote_that_does_not_end_swallows_no_rows(tmp_path):
    (tmp_path / "b.csv").write_text("  \n,,\n\ntext,n\none,1\n")
    assert texts([tmp_path / "b.csv"]) == ["one"]
    (tmp_path / "a.csv").write_text('text,n\n"one, two\nthree",1\n"open,2\nmore,3\n')
    first, bad = read([tmp_path / "a.csv"])
    assert first.text == "one, two\nthree" and "not CSV (unexpected end of data)" in bad.reason


def test_input_that_changes_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    files = find_files([str(tmp_path)])
    check_unchanged(files)
    (tmp_path / "a.txt").write_text("after it")
    with pytest.raises(ConfigError, match=r"a\.txt changed while it was read"):
        check_unchanged(files)
