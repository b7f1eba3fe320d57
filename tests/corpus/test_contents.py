import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile

import numpy as np
import pytest
import zstandard

from megalm.corpus import documents as module
from megalm.corpus.blocks import Blocks
from megalm.corpus.contents import Recoded, explain_no_documents, find_compression, find_encoding, is_like_text
from megalm.corpus.documents import BadDocument, cut_into_pieces, find_files, read_piece
from megalm.corpus.json_lines import read_lines

LINES = "".join(json.dumps({"text": f"né {n}"}, ensure_ascii=False) + "\n" for n in range(50))
TEXTS = [f"né {n}" for n in range(50)]


def read(path, field="text"):
    return [found for piece in cut_into_pieces(find_files([str(path)])) for found in read_piece(piece, field)]


def texts(path):
    return [found.text for found in read(path)]


def tar(form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(LINES.encode())
        archive.addfile(info, io.BytesIO(LINES.encode()))
    return out.getvalue()


def old_tar():
    """As before POSIX: without the magic, known by its checksum alone."""
    block = bytearray(tar(tarfile.GNU_FORMAT)[:512])
    block[257:265], block[148:156] = bytes(8), b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + LINES.encode()


def zipped(name):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, LINES)
    return out.getvalue()


def array(save):
    out = io.BytesIO()
    save(out, np.arange(5))
    return out.getvalue()


def database(tmp_path):
    connection = sqlite3.connect(tmp_path / "db")
    connection.execute("create table a (text text)")
    connection.commit()
    return (tmp_path / "db").read_bytes()


CONTENTS = {
    "a tar archive": lambda _: tar(tarfile.USTAR_FORMAT),
    "a tar archive, GNU": lambda _: tar(tarfile.GNU_FORMAT),
    "a tar archive, PAX": lambda _: tar(tarfile.PAX_FORMAT),
    "a tar archive, before POSIX": lambda _: old_tar(),
    "a zip archive": lambda _: zipped("a.jsonl"),
    "a document of an office program": lambda _: zipped("[Content_Types].xml"),
    "a document or book": lambda _: zipped("mimetype"),
    "arrays of numpy": lambda _: array(np.savez),
    "an array of numpy": lambda _: array(np.save),
    "a database": database,
    "a web archive": lambda _: b"WARC/1.0\r\nWARC-Type: warcinfo\r\n\r\n" + LINES.encode(),
    "a 7z archive": lambda _: b"7z\xbc\xaf\x27\x1c\0\4" + bytes(90),
    "a PDF": lambda _: b"%PDF-1.4\n%\xe2\xe3\n" + LINES.encode(),
    "a pointer of Git LFS": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "a pointer of git-annex": lambda _: b"/annex/objects/MD5E-s3--0.txt\n",
    "a dump of a wiki": lambda _: b'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">\n<page>',
    "compressed by lz4": lambda _: b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(90),
    "a Feather file of version 1": lambda _: b"FEA1" + bytes(90),
    "an image": lambda _: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
}


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize(
    "ending", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt.gz", ".jsonl.zst", ".csv.xz", ""]
)
def test_what_holds_no_documents_is_refused_by_what_it_is(tmp_path, what, ending):
    content = CONTENTS[what](tmp_path)
    packed = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}.get(
        ending[-3:], lambda data: data
    )
    packed = zstandard.compress if ending.endswith(".zst") else packed
    (tmp_path / f"a{ending}").write_bytes(packed(content))
    (found,) = read(tmp_path / f"a{ending}")
    assert isinstance(found, BadDocument) and found.place == "byte 0"
    assert found.reason.startswith(f"is {what.split(',')[0]}") and found.reason.endswith("; the file is left out")
    if ".jsonl" in ending:  # read in another way by tools/dedup
        (piece,) = find_files([str(tmp_path / f"a{ending}")])
        assert [wrong for lines in read_lines(piece, "text") for _, wrong in lines.bad] == [found]
        assert Blocks(piece).next(None).broken == (found.place, found.reason)


def test_tables_under_another_name_say_which_it_should_be(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.txt")
    (found,) = read(tmp_path / "a.txt")
    assert found.reason.startswith("is a Parquet file: give it the ending .parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.jsonl"), table.schema) as writer:
        writer.write_table(table)
    (found,) = read(tmp_path / "a.jsonl")
    assert found.reason.startswith("is an Arrow file: give it the ending .arrow")
    for compression in ("uncompressed", "zstd"):
        pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"), compression=compression)
        assert texts(tmp_path / "a.feather") == TEXTS
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    (tmp_path / "b.parquet").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert texts(tmp_path / "b.parquet") == TEXTS


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bz2", "xz", "lzma"])
def test_a_compressed_file_is_known_by_its_content_and_a_plain_one_too(tmp_path, kind):
    def alone(data):
        return lzma.compress(data, lzma.FORMAT_ALONE)

    pack = {"gzip": gzip.compress, "zstd": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress, "lzma": alone}[
        kind
    ]
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.lzma"):
        for content in (pack(LINES.encode()), LINES.encode()):
            (tmp_path / name).write_bytes(content)
            assert texts(tmp_path / name) == TEXTS
    assert find_compression(pack(b"")) == find_compression(pack(b"x" * 99)) == kind
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(pack(LINES.encode())))
    (found,) = read(tmp_path / "b.jsonl.gz")
    assert found.reason.startswith(f"is compressed twice, inside by {kind}: unpack it once")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".jsonl.gz", ".txt.gz"])
def test_text_with_a_mark_of_utf_16_is_read(tmp_path, monkeypatch, encoding, ending):
    content = {".csv": "text\n" + "\n".join(TEXTS), ".json": json.dumps(TEXTS)}.get(ending, LINES)
    data = content.encode(encoding)
    data = data if encoding in ("utf-16", "utf-32") else "\ufeff".encode(encoding) + data
    (tmp_path / f"a{ending}").write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    expected = [LINES] if ".txt" in ending else TEXTS
    assert texts(tmp_path / f"a{ending}") == expected
    (piece,) = find_files([str(tmp_path / f"a{ending}")])
    if ".jsonl" in ending:
        assert [bytes(part.data).decode() for part in read_lines(piece, "text")] == ["".join(TEXTS)]
    monkeypatch.setattr(module, "SMALLEST_PIECE", 100)
    monkeypatch.setattr(module, "LONGEST_TEXT", 300)
    monkeypatch.setattr(module, "TEXT_PIECE", 300)
    if ".json" not in ending[:5] or ".jsonl" in ending:
        (piece,) = cut_into_pieces(find_files([str(tmp_path / f"a{ending}")]))  # not by bytes, but dealt out
        parts = [found.text for found in read_piece(piece)]
        assert "".join(parts) == "".join(expected) and (piece.block or ".csv" in ending)
    if ".jsonl" in ending:
        blocks = Blocks(piece, 200)
        blocks_of = iter(lambda: blocks.next(str(tmp_path / "block")), None)
        assert [found.text for block in blocks_of for found in read_piece(block)] == TEXTS


def test_a_text_that_ends_inside_a_character_of_utf_16_is_bad(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES.encode("utf-16")[:-1])
    *whole, last = read(tmp_path / "a.jsonl")
    assert [found.text for found in whole] == TEXTS[: len(whole)] and "begins with the mark of UTF-16" in last.reason


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".csv"])
def test_a_nul_byte_is_no_text(tmp_path, ending):
    content = b"text\nabc\nd\0f\n" if ending == ".csv" else "né\0".encode()
    (tmp_path / f"a{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    *before, found = read(tmp_path / f"a{ending}")
    assert "holds a NUL byte" in found.reason and found.place == ("line 3" if before else "byte 3")
    (tmp_path / "b.txt").write_bytes("no mark".encode("utf-16-le"))
    assert "UTF-16 without a mark" in read(tmp_path / "b.txt")[0].reason


def test_text_in_another_encoding_and_other_line_ends_say_so(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert "if it is text in another encoding" in read(tmp_path / "a.txt")[0].reason
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\r{"text": "b"}\r')
    assert "its lines end in CR alone" in read(tmp_path / "a.jsonl")[0].reason
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert texts(tmp_path / "a.jsonl") == ["a", "b"]
    (tmp_path / "a.csv").write_bytes(b"text\ra\rb\r")
    assert texts(tmp_path / "a.csv") == ["a", "b"]


def test_text_is_taken_for_nothing_else():
    for text in (
        "WARC/ and peace",
        "BZh is no archive",
        "%PDF is a format",
        "PK",
        "7z a",
        "ORC and elf",
        "version 1",
        "]",
        "<p>",
        "Rar!",
    ):
        assert not explain_no_documents((text * 99).encode(), False) and not find_compression((text * 99).encode())
        assert is_like_text(text.encode()) and not find_encoding(text.encode())
    assert not explain_no_documents(bytes(600), False)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_without_a_mark_is_named_with_what_mends_it(tmp_path, encoding):
    (tmp_path / "wide.jsonl").write_bytes('{"text": "some words of text"}\n'.encode(encoding))
    (found,) = read(tmp_path / "wide.jsonl")
    short = encoding.replace("-le", "le").replace("-be", "be")
    assert f"is text in {short.upper()} without a byte order mark: `iconv -f {short} -t utf-8`" in found.reason


@pytest.mark.parametrize("window", [27, 28, 31])
def test_zstd_with_a_long_window_is_read(tmp_path, window):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(LINES.encode()) + stream.flush())
    assert texts(tmp_path / "a.jsonl.zst") == TEXTS


def test_zstd_that_needs_what_is_not_there_is_not_called_damaged(tmp_path):
    dictionary = zstandard.ZstdCompressionDict(LINES.encode() * 20)
    trained = zstandard.train_dictionary(2000, [f"né {n} {n * n}".encode() * 9 for n in range(500)])
    assert trained.dict_id() and not dictionary.dict_id()
    packed = zstandard.ZstdCompressor(dict_data=trained).compress(LINES.encode())
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()) + packed)
    *whole, last = read(tmp_path / "a.jsonl.zst")
    assert [found.text for found in whole] == TEXTS
    assert (
        f"with the dictionary {trained.dict_id()}, which is in another file" in last.reason
        and "damaged" not in last.reason
    )
    frame = bytes([0x28, 0xB5, 0x2F, 0xFD, 0, (40 - 10) << 3]) + bytes(30)  # a window of 2^40 bytes
    (tmp_path / "b.jsonl.zst").write_bytes(frame)
    (found,) = read(tmp_path / "b.jsonl.zst")
    assert (
        "asks for more memory to be unpacked than the 2,147,483,648 bytes" in found.reason
        and "damaged" not in found.reason
    )


def test_csv_may_begin_with_empty_lines_and_says_what_its_columns_hide(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf\r\n\r\ntext,n\r\n\r\na,1\r\nb\r\n")
    assert texts(tmp_path / "a.csv") == ["a", "b"]
    (tmp_path / "a.csv").write_text("text,n\nhello, world,1\nb,2\n")
    wrong, right = read(tmp_path / "a.csv")
    assert wrong.place == "line 2" and "has 3 values for 2 columns" in wrong.reason and right.text == "b"
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    (found,) = read(tmp_path / "a.csv")
    assert "the column 'text' is there twice" in found.reason
    (tmp_path / "a.tsv").write_text('text\tn\na, b\t1\n"c\td"\t2\n')
    assert texts(tmp_path / "a.tsv") == ["a, b", "c\td"]


def test_recoding_gives_the_same_for_any_size_of_reads():
    source = io.BufferedReader(io.BytesIO("日本語\U0001f600é".encode("utf-16") * 3))
    stream, out = Recoded(source, "utf-16"), b""
    while part := stream.read(1):
        out += part
    assert out.decode().startswith("日本語\U0001f600é")
