"""Serves the page of a sample to this machine's browser, and keeps the labels that it is given."""

from __future__ import annotations

import json
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlsplit

from megalm.config.errors import ConfigError
from megalm.corpus.look.labels import Labels
from megalm.corpus.look.sample import Sample
from megalm.corpus.look.search import Search
from megalm.corpus.look.view import View, render_page
from megalm.serving import GONE, LocalHandler, LocalServer


class LookServer(LocalServer):
    """The page at /, the whole of a text at /text, the search over everything at /search, labels at /labels."""

    def __init__(self, sample: Sample, view: View, labels: Labels, search: Search | None, port: int = 0):
        """search: over the whole corpus; None: the sample alone is searched. Errors: ConfigError where the port is taken"""
        self.view, self.labels, self.search = view, labels, search
        self.texts = {document.key: document for document in sample.documents}
        super().__init__(port, _Handler)


class _Handler(LocalHandler):
    server: LookServer

    def do_GET(self) -> None:
        if not self.is_local():
            return
        address = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(address.query).items()}
        try:
            self._answer(address.path, asked)
        except ConfigError as error:
            self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except GONE:
            self.close_connection = True

    def _answer(self, path: str, asked: dict[str, str]) -> None:
        server = self.server
        if path == "/":
            labels = {key: one.label for key, one in server.labels.latest.items()}
            page = render_page({**server.view, "searches": server.search is not None}, labels, live=True)
            self.send_content(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")
        elif path == "/text" and asked.get("key", "") in server.texts:
            self.send_json(HTTPStatus.OK, {"text": server.texts[asked["key"]].text})
        elif path == "/search" and server.search is not None:
            self.send_json(HTTPStatus.OK, server.search.find(asked.get("q", "")))
        elif path.startswith("/labels/") and path.endswith(".jsonl"):
            label = unquote(path[len("/labels/") : -len(".jsonl")])
            rows = [{"text": one.text, "key": one.key, "place": one.place} for one in server.labels.of_label(label)]
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self.send_content(HTTPStatus.OK, content.encode("utf-8", "replace"), "application/x-ndjson")
        elif path == "/favicon.ico":
            self.send_content(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
        else:
            self.refuse(HTTPStatus.NOT_FOUND, f"{path}: there is no such page here")

    def do_POST(self) -> None:
        if not self.is_local():
            return
        try:
            asked = self.read_json()
            if urlsplit(self.path).path != "/labels" or not isinstance(asked, dict):
                raise ConfigError(
                    "labels are posted to /labels as {key, label}, or {label, text, place} of what was searched"
                )
            self.send_json(HTTPStatus.OK, {"labels": self._give(asked)})
        except ConfigError as error:
            self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except GONE:
            self.close_connection = True

    def _give(self, asked: dict[str, object]) -> dict[str, int]:
        key, label = str(asked.get("key")), asked.get("label")
        if label is not None and not isinstance(label, str):
            raise ConfigError(f"label {label!r}: give a word, or null to take it back")
        known = self.server.texts.get(key) or (self.server.search and self.server.search.shown.get(key))
        if not known:
            raise ConfigError(f"key {key!r} is of no document that this page has shown")
        self.server.labels.give(key, label, known.text, known.place)
        return self.server.labels.counts()
