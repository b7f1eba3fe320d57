"""Pages of web archives: the texts that a WET file holds, and those that are extracted out of the HTML of a WARC file.

The records are read by warcio, the text of a page is found by trafilatura.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megalm.config.errors import ConfigError
from megalm.corpus.archives import Unreadable, read_some

HTML = ("text/html", "application/xhtml+xml")
LARGEST_PAGE = 16 << 20  # bytes of HTML; beyond it, it is no page that somebody reads


@dataclass(frozen=True)
class Page:
    """A record with a text, by its number in the file; `wrong` says why there is none, and that the file ends here."""

    number: int
    text: str
    fields: dict[str, Any]
    wrong: str = ""


def read_pages(file: BinaryIO) -> Iterator[Page]:
    """Read the pages of a WARC or WET file, in order. Requests, redirections, images and pages without text are left out.

    Errors: Unreadable where the file is damaged; ConfigError where warcio or, for HTML, trafilatura is not installed.
    """
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as error:
        raise ConfigError('web archives need warcio and trafilatura: `pip install "megalm[web]"`.') from error
    number, watched = -1, _Watched(file)
    try:
        for number, record in enumerate(ArchiveIterator(watched)):
            text, title = _text_of(record)
            if watched.damage is not None and record.raw_stream.limit > 0:
                break  # bytes of this record are missing
            if text:
                yield Page(number, text, _fields_of(record, text, title))
    except ArchiveLoadFailed as error:
        yield Page(number + 1, "", {}, f"not a record of WARC ({error}); the rest of the file is left out")
    if watched.damage is not None:
        raise watched.damage


class _Watched:
    """A file that ends where it is damaged, and keeps what was wrong: warcio takes an EOFError for the end."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.damage: Unreadable | None = None

    def read(self, size: int) -> bytes:
        """Read bytes of the file."""
        try:
            return read_some(self._file, size)
        except Unreadable as error:
            self.damage = error
            return b""

    def close(self) -> None:
        """Whoever opened the file closes it."""


def _text_of(record: Any) -> tuple[str, str]:
    """The text and the title of a record; empty where it is no page."""
    if record.rec_type == "conversion":
        return record.content_stream().read().decode("utf-8", "replace").strip(), ""
    if record.rec_type not in ("response", "resource"):
        return "", ""
    headers = record.http_headers
    kind = (headers.get_header("Content-Type") if headers else record.content_type) or ""
    answered = headers is None or headers.get_statuscode() == "200"
    if not answered or kind.partition(";")[0].strip().lower() not in HTML:
        return "", ""
    return extract_text(record.content_stream().read(LARGEST_PAGE), record.rec_headers.get_header("WARC-Target-URI"))


def extract_text(html: bytes, url: str | None = None) -> tuple[str, str]:
    """The main text of a page and its title; empty where there is none.

    Errors: ConfigError where trafilatura is not installed.
    """
    try:
        import trafilatura
    except ImportError as error:
        raise ConfigError('HTML needs trafilatura: `pip install "megalm[web]"`.') from error
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it reports every page that has no text
    try:
        found = trafilatura.bare_extraction(html, url=url, include_comments=False, with_metadata=True)
    except (ValueError, AttributeError, RecursionError):  # of HTML that its parser cannot follow
        return "", ""
    if found is None or isinstance(found, dict):  # a dict only where it was asked for
        return "", ""
    return (found.text or "").strip(), found.title or ""


def _fields_of(record: Any, text: str, title: str) -> dict[str, Any]:
    headers = record.rec_headers
    fields = {"text": text, "url": headers.get_header("WARC-Target-URI"), "date": headers.get_header("WARC-Date")}
    language = headers.get_header("WARC-Identified-Content-Language")
    fields |= {"title": title} if title else {}
    fields |= {"language": language.split(",")[0]} if language else {}
    return {**fields, "id": headers.get_header("WARC-Record-ID")}
