"""A model behind a local port: a page to talk with it, and OpenAI's completions for tools and judges.

It listens on the loopback address alone, and answers only requests whose Host says so, since any web page that is open in the
same browser can send requests to a local port.
"""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megalm.config.errors import ConfigError
from megalm.generate.chat import Speaker
from megalm.generate.openai import Asked, make_answer, make_piece, read_request

PAGE = Path(__file__).parent / "chat_page.html"
MOST_BYTES = 8 << 20
"""Of a request's body."""
HOSTS = ("127.0.0.1", "localhost", "[::1]")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


class ChatServer(ThreadingHTTPServer):
    """Serves one model on 127.0.0.1. port 0: any that is free."""

    daemon_threads = True

    def __init__(self, speaker: Speaker, port: int = 0) -> None:
        """Errors: ConfigError where the port is taken"""
        self.speaker = speaker
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--port {port}: cannot be listened on ({error}); choose another, or 0") from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> threading.Thread:
        """Serve in a thread of its own until `shutdown`."""
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        return thread


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what people write is not printed."""

    def do_GET(self) -> None:
        if not self._is_local():
            return
        path = urlsplit(self.path).path
        if path == "/":
            page = PAGE.read_text(encoding="utf-8").replace("{{MODEL}}", _escape(self.server.speaker.name))
            self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")
        elif path == "/v1/models":
            model = {"id": self.server.speaker.name, "object": "model", "owned_by": "local"}
            self._send_json(HTTPStatus.OK, {"object": "list", "data": [model]})
        elif path == "/favicon.ico":
            self._send(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
        else:
            self._refuse(
                HTTPStatus.NOT_FOUND, f"{path}: there are /, /v1/models, /v1/completions, /v1/chat/completions"
            )

    def do_POST(self) -> None:
        if not self._is_local():
            return
        path = urlsplit(self.path).path
        kinds = {"/v1/completions": False, "/v1/chat/completions": True}
        if path not in kinds:
            self._refuse(HTTPStatus.NOT_FOUND, f"{path}: there are {', '.join(kinds)}")
            return
        try:
            asked = read_request(self._body(), self.server.speaker, chat=kinds[path])
            if asked.stream:
                self._stream(asked)
            else:
                written = self.server.speaker.write(asked.prompts, asked.sampling, asked.stop)
                self._send_json(HTTPStatus.OK, make_answer(asked, written, self.server.speaker))
        except ConfigError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except GONE:
            self.close_connection = True

    def _is_local(self) -> bool:
        """Whether the request is meant for this address, and does not come from another's page."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        origin = self.headers.get("Origin")
        if host in HOSTS and (origin is None or urlsplit(origin).netloc == self.headers.get("Host")):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "this server answers its own machine and its own page alone")
        return False

    def _body(self) -> Any:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise ConfigError("the request needs a Content-Length") from None
        if not 0 <= length <= MOST_BYTES:
            self.close_connection = True
            raise ConfigError(f"the body has {length} bytes; at most {MOST_BYTES}")
        try:
            return json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the body is not JSON ({error})") from None

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

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True  # of a body that was not read, nothing is taken for the next request
        self._send_json(status, {"error": {"message": message, "type": "invalid_request_error", "code": int(status)}})

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
