"""Documents out of web archives: WET texts, HTML of WARC, compressed record by record, damaged."""

import gzip
import io
import json

import pytest

from megalm.corpus.documents import BadDocument, find_files, read_piece
from tools.filter.__main__ import main

warcio = pytest.importorskip("warcio")
pytest.importorskip("trafilatura")

from warcio.statusandheaders import StatusAndHeaders  # noqa: E402
from warcio.warcwriter import WARCWriter  # noqa: E402

PARAGRAPH = (
    "The ferry leaves the old harbour every morning at seven, and the crossing takes about two hours in calm weather. "
)
PAGE = (
    "<html><head><title>Ferry &amp; Harbour</title><script>var hidden = 1;</script></head><body><nav><a href='/'>Home</a></nav>"
    f"<article><h1>The ferry</h1><p>{PARAGRAPH * 2}</p><p>Tickets cost 4 € (schön).</p></article>"
    "<footer>All rights reserved</footer></body></html>"
)


def response(writer, url, body, kind="text/html; charset=utf-8", status="200 OK", extra=()):
    headers = StatusAndHeaders(status, [("Content-Type", kind), *extra], protocol="HTTP/1.1")
    writer.write_record(writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=headers))


def write_archive(path, gz=True):
    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=gz)
        writer.write_record(writer.create_warcinfo_record(path.name, {"software": "test"}))
        response(writer, "http://example.org/ferry", PAGE.encode())
        response(writer, "http://example.org/moved", b"", status="301 Moved")
        response(writer, "http://example.org/picture", b"\x89PNG", kind="image/png")
        response(writer, "http://example.org/latin", PAGE.encode("cp1252"), kind="text/html; charset=windows-1252")
        response(
            writer, "http://example.org/zipped", gzip.compress(PAGE.encode()), extra=[("Content-Encoding", "gzip")]
        )
        response(writer, "http://example.org/empty", b"<html><body></body></html>")


def read(path):
    (piece,) = find_files([str(path)])
    return list(read_piece(piece))


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc"])
def test_pages_are_texts_with_address_and_title(tmp_path, name):
    write_archive(tmp_path / name, gz=name.endswith(".gz"))
    found = read(tmp_path / name)
    assert [document.fields["url"].rpartition("/")[2] for document in found] == ["ferry", "latin", "zipped"]
    for document in found:
        assert PARAGRAPH.strip() in document.text and "4 € (schön)" in document.text
        assert "hidden" not in document.text and document.fields["title"] == "The ferry"
    assert [document.place for document in found] == ["item 1", "item 4", "item 5"]


def test_texts_of_wet_files(tmp_path):
    with open(tmp_path / "a.warc.wet.gz", "wb") as file:
        writer = WARCWriter(file, gzip=True)
        headers = {"WARC-Identified-Content-Language": "deu,eng"}
        record = writer.create_warc_record(
            "http://example.org/x", "conversion", payload=io.BytesIO("Schöner Text\nzweite Zeile\n".encode()),
            warc_content_type="text/plain", warc_headers_dict=headers,
        )  # fmt: skip
        writer.write_record(record)
    (document,) = read(tmp_path / "a.warc.wet.gz")
    assert document.text == "Schöner Text\nzweite Zeile" and document.fields["language"] == "deu"


def test_what_is_cut_off_or_no_archive_is_told(tmp_path):
    write_archive(tmp_path / "a.warc.gz")
    whole = (tmp_path / "a.warc.gz").read_bytes()
    (tmp_path / "a.warc.gz").write_bytes(whole[: len(whole) // 2])
    *kept, bad = read(tmp_path / "a.warc.gz")
    assert isinstance(bad, BadDocument) and "cut off" in bad.reason and kept
    (tmp_path / "b.warc").write_text("this is no archive\n" * 3)
    (bad,) = read(tmp_path / "b.warc")
    assert isinstance(bad, BadDocument) and "not a record of WARC" in bad.reason


def test_from_an_archive_through_rules(tmp_path):
    write_archive(tmp_path / "a.warc.gz")
    (tmp_path / "r.yaml").write_text(
        "rules:\n- {score: words, at_least: 30}\n- {address: url, domains: [no.example]}\n"
    )
    command = [str(tmp_path / "a.warc.gz"), "--rules", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "o.jsonl")]
    assert main([*command, "--workers", "1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").open()]
    assert len(rows) == 3 and rows[0]["title"] == "The ferry" and rows[0]["filter"]["scores"]["words"] > 30
