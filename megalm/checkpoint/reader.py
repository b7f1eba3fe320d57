"""A committed checkpoint as plain global tensors: for tools, conversion and generation; no ranks, no boxes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.boxes import look_up_dtype
from megalm.checkpoint.errors import CorruptCheckpointError
from megalm.checkpoint.load import OPTIMIZER_PREFIX, read_chunk, read_state
from megalm.checkpoint.manifest import sort_naturally
from megalm.checkpoint.store import open_checkpoint
from megalm.config.errors import ConfigError


class CheckpointReader:
    """Reads a checkpoint tensor by tensor, each piece compared with its checksum.

    Args: path: a checkpoint's folder, or a folder of checkpoints or a run (then the newest good one); or the URL of one.
    Errors: ConfigError when there is none; CorruptCheckpointError when it is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.source = open_checkpoint(path)
        self.path = self.source.name
        self.manifest = self.source.manifest()

    @property
    def step(self) -> int:
        return self.manifest.step

    def state(self) -> dict[str, Any]:
        """The run's state as it was saved."""
        return read_state(self.source, self.manifest)

    def names(self, *, optimizer: bool = False) -> list[str]:
        """The names of the weights, or of everything; layers in the order of their numbers."""
        names = sorted(self.manifest.tensors, key=sort_naturally)
        return [name for name in names if optimizer or not name.startswith(OPTIMIZER_PREFIX)]

    def tensor(self, name: str) -> torch.Tensor:
        """One whole global tensor, in host memory."""
        record = self.manifest.tensors.get(name)
        if record is None:
            raise ConfigError(f"{self.path}: holds no tensor {name}; megalm inspect lists those it holds.")
        result = torch.empty(record.shape, dtype=look_up_dtype(record.dtype))
        filled = 0
        for chunk in record.chunks:
            target = result
            for dim, (start, size) in enumerate(zip(*chunk.region, strict=True)):
                target = target.narrow(dim, start, size)
            target.copy_(read_chunk(self.source, name, record, chunk))
            filled += chunk.region.numel
        if filled != result.numel():
            raise CorruptCheckpointError(f"{self.path}: {name}: {filled} of its {result.numel()} elements are there")
        return result

    def tensors(self, *, optimizer: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensor after tensor; one at a time is in memory."""
        for name in self.names(optimizer=optimizer):
            yield name, self.tensor(name)
