"""A page of this machine for its own browser: what every local server of ours refuses, and how it answers.

It listens on the loopback address alone, and answers only requests whose Host says so, since any web page that is open in the
same browser can send requests to a local port.
"""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from megalm.config.errors import ConfigError

MOST_BYTES = 8 << 20
"""Of a request's body."""
HOSTS = ("127.0.0.1", "localhost", "[::1]")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


class LocalServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1. port 0: any that is free."""

    daemon_threads = True

    def __init__(self, port: int, handler: type[LocalHandler]) -> None:
        """Errors: ConfigError where the port is taken"""
        try:
            super().__init__(("127.0.0.1", port), handler)
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


class LocalHandler(BaseHTTPRequestHandler):
    """Answers one connection; a subclass has do_GET and do_POST, which ask `is_local` first."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what people write and read is not printed."""

    def is_local(self) -> bool:
        """Whether the request is meant for this address, and does not come from another's page; if not, it is refused."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        origin = self.headers.get("Origin")
        if host in HOSTS and (origin is None or urlsplit(origin).netloc == self.headers.get("Host")):
            return True
        self.refuse(HTTPStatus.FORBIDDEN, "this server answers its own machine and its own page alone")
        return False

    def read_json(self) -> Any:
        """Read the body. Errors: ConfigError for one that is too long, or no JSON"""
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

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer with what is wrong, in OpenAI's form."""
        self.close_connection = True  # of a body that was not read, nothing is taken for the next request
        self.send_json(status, {"error": {"message": message, "type": "invalid_request_error", "code": int(status)}})

    def send_json(self, status: HTTPStatus, content: Any) -> None:
        """Answer with JSON."""
        self.send_content(status, json.dumps(content).encode(), "application/json")

    def send_content(self, status: HTTPStatus, content: bytes, kind: str, **headers: str) -> None:
        """Answer with bytes of a content type; `headers` by their names with _ for -."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
