"""One micro-batch of one data rank."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


def declare_dims(*dims: str, optional: bool = True) -> Any:
    """A field of a batch and what its dims are: `batch`, `sequence` (cut over the context ranks), `whole_sequence` (each of
    them needs all of it), or any other name."""
    metadata = {"dims": dims}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


@dataclass(frozen=True)
class Batch:
    """Tokens and what is to be predicted from them.

    Each field declares its dims: context parallelism cuts those along `sequence` to this rank's positions, [B, S/c], without
    knowing them. A batch with further fields is a subclass that declares them.
    """

    tokens: Tensor = declare_dims("batch", "sequence", optional=False)
    """int64: the input."""
    labels: Tensor = declare_dims("batch", "sequence", optional=False)
    """int64: the token that follows each position."""
    loss_mask: Tensor | None = declare_dims("batch", "sequence")
    """float32: weight of each position in the loss; None: all ones."""
    positions: Tensor | None = declare_dims("batch", "sequence")
    """int64: position of each token in its document; None: 0 .. S-1."""
    document_ids: Tensor | None = declare_dims("batch", "whole_sequence")
    """int32: which document each token is of; attention stays within one. None: one document. Whole, [B, S], on every
    context rank."""
    sources: Tensor | None = declare_dims("batch")
    """int64 [B]: number of the source that each row is of; given where there is more than one source."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; a GPU takes it up when it gets there, the host goes on at once."""
        device = torch.device(device)
        moved = {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}
        if device.type == "cuda":
            # From pageable memory the host would wait until all that was launched before is done. torch gives page-locked
            # memory to nobody else before the copy from it is over.
            moved = {name: t.pin_memory() if t.device.type == "cpu" else t for name, t in moved.items()}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in moved.items()})

    @property
    def token_count(self) -> float:
        """Positions that count in the loss."""
        return float(self.tokens.numel() if self.loss_mask is None else self.loss_mask.sum().item())
