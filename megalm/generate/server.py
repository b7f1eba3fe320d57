"""A model behind a local port: a page to talk with it, and OpenAI's completions for tools and judges."""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megalm.config.errors import ConfigError
from megalm.generate.chat import Speaker
from megalm.generate.openai import Asked, make_answer, make_piece, read_request
from megalm.serving import GONE, LocalHandler, LocalServer

PAGE = Path(__file__).parent / "chat_page.html"


class ChatServer(LocalServer):
    """Serves one model on 127.0.0.1. port 0: any that is free."""

    def __init__(self, speaker: Speaker, port: int = 0) -> None:
        """Errors: ConfigError where the port is taken"""
        self.speaker = speaker
        super().__init__(port, _Handler)


class _Handler(LocalHandler):
    server: ChatServer

    def do_GET(self) -> None:
        if not self.is_local():
            return
        path = urlsplit(self.path).path
        if path == "/":
            page = PAGE.read_text(encoding="utf-8").replace("{{MODEL}}", _escape(self.server.speaker.name))
            self.send_content(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")
        elif path == "/v1/models":
            model = {"id": self.server.speaker.name, "object": "model", "owned_by": "local"}
            self.send_json(HTTPStatus.OK, {"object": "list", "data": [model]})
        elif path == "/favicon.ico":
            self.send_content(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
        else:
            self.refuse(HTTPStatus.NOT_FOUND, f"{path}: there are /, /v1/models, /v1/completions, /v1/chat/completions")

    def do_POST(self) -> None:
        if not self.is_local():
            return
        path = urlsplit(self.path).path
        kinds = {"/v1/completions": False, "/v1/chat/completions": True}
        if path not in kinds:
            self.refuse(HTTPStatus.NOT_FOUND, f"{path}: there are {', '.join(kinds)}")
            return
        try:
            asked = read_request(self.read_json(), self.server.speaker, chat=kinds[path])
            if asked.stream:
                self._stream(asked)
            else:
                written = self.server.speaker.write(asked.prompts, asked.sampling, asked.stop)
                self.send_json(HTTPStatus.OK, make_answer(asked, written, self.server.speaker))
        except ConfigError as error:
            self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        except GONE:
            self.close_connection = True

    def _stream(self, asked: Asked) -> None:
        """Server-sent events as text comes; where nobody listens any more the model stops."""
        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        begun: set[int] = set()
        gone = False

        def tell(which: int, text: str) -> bool:
            nonlocal gone
            if asked.chat and which not in begun:
                text = text.removeprefix(" ")
            begun.add(which)
            try:
                self._event(make_piece(asked, which, text))
            except GONE:
                gone = True
            return gone

        try:
            written = self.server.speaker.write(asked.prompts, asked.sampling, asked.stop, tell)
        except ConfigError as error:  # the answer has begun: it says so in the stream
            self._event({"error": {"message": str(error), "type": "invalid_request_error"}})
            return
        if not gone:
            for which, one in enumerate(written):
                self._event(make_piece(asked, which, "", one.written.reason))
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
