"""Reading a whole checkpoint to see that it is what was saved."""

from collections.abc import Iterator

import xxhash

from megalm.checkpoint.errors import CorruptCheckpointError
from megalm.checkpoint.load import read_chunk
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.source import CheckpointSource

# Bytes read at a time: large enough for a disk, small beside a model.
_READ_BYTES = 16 << 20


def verify(source: CheckpointSource) -> Manifest:
    """The manifest of a whole checkpoint; CorruptCheckpointError at the first byte that does not match its checksum."""
    manifest = source.manifest()
    for problem in list_problems(source, manifest):
        raise CorruptCheckpointError(problem)
    return manifest


def list_problems(source: CheckpointSource, manifest: Manifest) -> Iterator[str]:
    """List what is wrong with a checkpoint's files: nothing, if it is whole.

    Each file is compared with the checksum of what was written, and each tensor's pieces with the checksum of the
    tensor they were copied from: the second finds what went wrong before the writing.
    """
    for name, record in sorted(manifest.files.items()):
        digest = xxhash.xxh3_64()
        try:
            for position in range(0, record.bytes, _READ_BYTES):
                digest.update(source.read(name, position, min(_READ_BYTES, record.bytes - position)))
        except CorruptCheckpointError as error:
            yield str(error)
            continue
        if digest.hexdigest() != record.xxh3:
            yield f"{source.name}: {name} is not what was written (its checksum differs)"
    for name, tensor in manifest.tensors.items():
        covered = 0
        for chunk in tensor.chunks:
            covered += chunk.region.numel
            try:
                read_chunk(source, name, tensor, chunk)
            except CorruptCheckpointError as error:
                yield str(error)
        numel = 1
        for size in tensor.shape:
            numel *= size
        if covered != numel:
            yield f"{source.name}: {name}: {covered} of its {numel} elements are there"
