"""What the first bytes of a file say that it is, whatever its name says: compressed, text in UTF-16, or nothing that could
be read as documents."""

from __future__ import annotations

import codecs
import io
import re
import tarfile
from typing import Any, BinaryIO

from megalm.corpus.archives import Stream, Unreadable

HEAD = 1 << 10  # bytes that are looked at; a tar says what it is within 512
UNPACK = "unpack it, and give what is in it"
CONVERT = "turn it into text, JSON lines or Parquet first"
_COMPRESSED = {  # as far as they can be read: see archives.py
    rb"\x1f\x8b\x08": "gzip",
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": "zstd",  # the second: a frame that is skipped
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bz2",
    rb"\xfd7zXZ\0": "xz",
    rb"\x5d\0\0[\0-\xff]{2}([\0-\xff]{3}\0{5}|\xff{8})": "lzma",
}
_OTHER = {
    rb"version https://git-lfs\.github\.com/spec/": (
        "a pointer of Git LFS and not the file itself",
        "fetch it by `git lfs pull`",
    ),
    rb"(\.\./)*(\.git)?/annex/objects/": (
        "a pointer of git-annex and not the file itself",
        "fetch it by `git annex get`",
    ),
    rb"WARC/\d\.\d+\r?\n|filedesc://": ("a web archive (WARC)", "give it the ending .warc"),
    rb"<mediawiki\s|<\?xml[^>]*>\s*<mediawiki\s": ("a dump of a wiki", "extract the texts of its pages first"),
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": ("a zip archive", UNPACK),
    rb"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    rb"Rar!\x1a\x07": ("a rar archive", UNPACK),
    rb"!<arch>\n": ("an ar archive or a Debian package", UNPACK),
    rb"\x04\x22\x4d\x18": ("compressed by lz4", "unpack it, or compress it by gzip, bz2, xz or zstd"),
    rb"\xff\x06\0\0sNaPpY": ("compressed by snappy", "unpack it, or compress it by gzip, bz2, xz or zstd"),
    rb"LZIP|\x89LZO|\x1f\x9d[\x80-\xff]": ("compressed by lzip, lzop or compress", "unpack it"),
    rb"%PDF-\d": ("a PDF", CONVERT),
    rb"\{\\rtf\d": ("a document in RTF", CONVERT),
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("a document of an office program", CONVERT),
    rb"SQLite format 3\0|[\0-\xff]{8}DUCK[\0-\xff]{3}\0": ("a database", "write its texts to Parquet or JSON lines"),
    rb"\x93NUMPY": ("an array of numpy", "write texts to JSON lines or Parquet"),
    rb"\x89HDF\r\n\x1a\n": ("an HDF5 file", CONVERT),
    rb"Obj\x01|ORC[\0-\x08\x0e-\x1f\x80-\xff]": ("an Avro or ORC file", CONVERT),
    rb"FEA1": ("a Feather file of version 1", "write it again as Parquet or Feather of version 2"),
    rb"\x80[\x02-\x05]": ("pickled, and could run anything", CONVERT),
    rb"GGUF[\1-\x09]\0": ("a model in GGUF", "name the texts"),
    rb"MMIDIDX\0\0": ("the index of a token file", "give the texts; tokens are read by data.train"),
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a[\0-\xff]{4}[\0-\x1f]": ("an image", "name the texts"),
    rb"\x7fELF|MZ[\0-\xff]\0": ("a program", "name the texts"),
}
_TABLES = {
    rb"PAR1": ("a Parquet file", ".parquet"),
    rb"ARROW1\0\0|\xff{4}[\0-\xff]{2}\0\0": ("an Arrow file", ".arrow"),
}
_IN_ZIP = {
    b"[Content_Types].xml": ("a document of an office program", CONVERT),
    b"_rels/.rels": ("a document of an office program", CONVERT),
    b"mimetype": ("a document or book (OpenDocument, EPUB)", CONVERT),
    b".npy": ("arrays of numpy", "write texts to JSON lines or Parquet"),
}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find_compression(head: bytes) -> str | None:
    """Find how a file that begins so is compressed; None: not in a way that is read."""
    return next((kind for magic, kind in _COMPRESSED.items() if re.match(magic, head)), None)


def find_encoding(head: bytes) -> str | None:
    """Find what the byte order mark says the text is, if not UTF-8."""
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)


def is_like_text(head: bytes) -> bool:
    """Whether these bytes are the beginning of a text in UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head) and b"\0" not in head


def explain_no_documents(head: bytes, table: bool) -> str:
    """What a file is that begins so and cannot be read, and what to do; empty for any other. `table`: whether it is read as
    Parquet or Arrow."""
    kind = find_compression(head)
    if kind is not None:
        return f"is compressed twice, inside by {kind}: unpack it once"
    found = next((about for magic, about in _OTHER.items() if re.match(magic, head)), None)
    if found and head.startswith(b"PK\x03\x04"):
        size = int.from_bytes(head[26:28], "little")
        name = head[30 : 30 + size]
        found = next((about for end, about in _IN_ZIP.items() if name.endswith(end)), found)
    if found is None and len(head) >= 512 and _is_tar(head[:512]):
        found = ("a tar archive", UNPACK)
    if found is None and not table:
        form = next((about for magic, about in _TABLES.items() if re.match(magic, head)), None)
        found = form and (form[0], f"give it the ending {form[1]}")
    if found is None and not table and not find_encoding(head) and (encoding := _guess_unmarked(head)):
        found = (
            f"text in {encoding.upper()} without a byte order mark",
            f"`iconv -f {encoding} -t utf-8` makes it UTF-8",
        )
    return f"is {found[0]}: {found[1]}" if found else ""


def _guess_unmarked(head: bytes) -> str | None:
    """The wide encoding of a text that says nothing of it, told by where its zero bytes are; scripts without ASCII have none."""
    sample = head[: min(len(head), 256) // 4 * 4]
    if len(sample) < 16:
        return None
    zero = [sample[lane::4].count(0) > 0.7 * len(sample) / 4 for lane in range(4)]
    none = [sample[lane::4].count(0) == 0 for lane in range(4)]
    lanes = {
        "utf-16le": zero[1] and zero[3] and none[0] and none[2],
        "utf-16be": zero[0] and zero[2] and none[1] and none[3],
        "utf-32le": zero[1] and zero[2] and zero[3] and none[0],
        "utf-32be": zero[0] and zero[1] and zero[2] and none[3],
    }
    return next((encoding for encoding, fits in lanes.items() if fits), None)


def _is_tar(block: bytes) -> bool:
    if b"\0" not in block or not block[0]:
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # which compares its checksum
    except tarfile.TarError:
        return False
    return True


class OtherContent(Unreadable):
    """A file that holds no documents as it is; `reason` says what it is and what to do."""


class Refused(Stream):
    """In place of a file whose content is not to be read: every read says why."""

    def __init__(self, reason: str):
        self._reason = reason

    def readinto(self, buffer: Any) -> int:
        raise OtherContent(0, f"{self._reason}; the file is left out")


class Recoded(Stream):
    """The content of a text in UTF-16 or UTF-32, in UTF-8 and without its mark."""

    def __init__(self, source: BinaryIO, encoding: str):
        self._source, self._encoding = source, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._output, self._ended, self._given = memoryview(b""), False, 0
        self._wrong: OtherContent | None = None

    def readinto(self, buffer: Any) -> int:
        while not self._output and not self._ended:
            if self._wrong is not None:
                raise self._wrong
            data = self._source.read1(1 << 16)  # type: ignore[attr-defined]
            self.consumed = getattr(getattr(self._source, "raw", None), "consumed", self.consumed + len(data))
            self._ended = not data
            try:
                self._output = memoryview(self._decoder.decode(data, not data).encode("utf-8"))
            except UnicodeError as error:
                self._wrong = OtherContent(
                    self._given,
                    f"begins with the mark of {self._encoding.upper()}, and is not ({error}); the rest is left out",
                )
                self._ended = False
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        self._given += count
        return count


def open_as_documents(file: BinaryIO, head: bytes, table: bool) -> BinaryIO:
    """Open the file, decompressed already, which begins so: as it is, in UTF-8, or as one that says why it cannot be read."""
    reason = explain_no_documents(head, table)
    if reason:
        return io.BufferedReader(Refused(reason))
    encoding = None if table else find_encoding(head)
    return file if encoding is None else io.BufferedReader(Recoded(file, encoding), 1 << 20)
