"""The manifest: what a checkpoint consists of, written last; a folder without a good one is no checkpoint."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import xxhash

from megalm.checkpoint.errors import CorruptCheckpointError
from megalm.checkpoint.regions import ELEMENT_BYTES, Region

MANIFEST = "manifest.json"
STATE = "state.json"
RANKS = "ranks.json"
METADATA = ".metadata"
FORMAT = "megalm-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """One file: its length, and the xxh3-64 of its bytes (as `xxhsum -H3` prints it)."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class ChunkRecord:
    """One stored piece of a global tensor: which region, and where its raw values lie."""

    region: Region
    file: str
    position: int
    """Byte offset of the values in the file."""
    xxh3: str
    """xxh3-64 of the values, taken from the tensor they were copied from."""


@dataclass
class TensorRecord:
    """One global tensor and the pieces that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[ChunkRecord] = field(default_factory=list)

    @property
    def itemsize(self) -> int:
        return ELEMENT_BYTES[self.dtype]


@dataclass
class Manifest:
    """Everything a reader needs to know about a checkpoint."""

    step: int
    attempt: str
    saved_at: str
    world_size: int
    layout: dict[str, int]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())


def sort_naturally(name: str) -> list[Any]:
    """Sorting by it puts layers.2 before layers.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def compute_checksum(data: Any) -> str:
    """xxh3-64 of a buffer, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def encode(manifest: Manifest) -> bytes:
    """Encode the manifest as JSON that carries a checksum of itself."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "saved_at": manifest.saved_at,
        "world_size": manifest.world_size,
        "layout": manifest.layout,
        "versions": manifest.versions,
        "files": {name: {"bytes": f.bytes, "xxh3": f.xxh3} for name, f in sorted(manifest.files.items())},
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "chunks": [[c.region.offset, c.region.shape, c.file, c.position, c.xxh3] for c in tensor.chunks],
            }
            for name, tensor in sorted(manifest.tensors.items())
        },
    }
    text = _canonical(body)
    return _wrapped(text)


def decode(data: bytes, where: str) -> Manifest:
    """Decode the manifest out of its JSON.

    Errors: CorruptCheckpointError if it is cut short, changed, or describes what cannot be.
    """
    try:
        body = json.loads(data)["body"]
        if bytes(data) != _wrapped(_canonical(body)):
            raise CorruptCheckpointError(f"{where}: its checksum does not match its text")
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise CorruptCheckpointError(
                f"{where}: format {body['format']!r} version {body['version']!r}; this megalm reads {FORMAT} {VERSION}"
            )
        files = {name: FileRecord(int(f["bytes"]), str(f["xxh3"])) for name, f in body["files"].items()}
        tensors = {
            name: TensorRecord(
                str(t["dtype"]),
                tuple(t["shape"]),
                [ChunkRecord(Region(tuple(o), tuple(s)), f, int(p), str(x)) for o, s, f, p, x in t["chunks"]],
            )
            for name, t in body["tensors"].items()
        }
        manifest = Manifest(
            int(body["step"]),
            str(body["attempt"]),
            str(body["saved_at"]),
            int(body["world_size"]),
            {str(axis): int(size) for axis, size in body["layout"].items()},
            {str(name): str(version) for name, version in body["versions"].items()},
            files,
            tensors,
        )
        _check(manifest, where)
        return manifest
    except CorruptCheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{where}: not a manifest ({type(error).__name__}: {error})") from None


def check_sizes(manifest: Manifest, size_of: Callable[[str], int | None], where: str) -> None:
    """Compare the files' lengths with the manifest's; CorruptCheckpointError at the first that differs."""
    for name, record in manifest.files.items():
        found = size_of(name)
        if found != record.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CorruptCheckpointError(f"{where}: {name} {state}; the manifest says {record.bytes} bytes")


def _wrapped(text: bytes) -> bytes:
    return b'{"checksum":"' + compute_checksum(text).encode() + b'","body":' + text + b"}"


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _check(manifest: Manifest, where: str) -> None:
    for name in manifest.files:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise CorruptCheckpointError(f"{where}: {name!r} is no name of a file in the checkpoint's folder")
    for name in (STATE, RANKS):
        if name not in manifest.files:
            raise CorruptCheckpointError(f"{where}: {name} is not listed")
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            end = chunk.position + chunk.region.numel * tensor.itemsize
            if chunk.file not in manifest.files or not 0 <= chunk.position <= end <= manifest.files[chunk.file].bytes:
                raise CorruptCheckpointError(f"{where}: a piece of {name} lies outside of {chunk.file!r}")
            if any(o < 0 or o + s > g for o, s, g in zip(*chunk.region, tensor.shape, strict=True)):
                raise CorruptCheckpointError(f"{where}: a piece of {name} lies outside of its shape {tensor.shape}")
