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
    further_labels: Tensor | None = declare_dims("batch", "sequence", "depth")
    """int64 [B, S, D]: the label 1 .. D positions on; see `look_ahead`."""
    further_mask: Tensor | None = declare_dims("batch", "sequence", "depth")
    """float32 [B, S, D]: weight of each in the loss, 0 where it lies in another document or behind the row's end."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; a GPU takes it up when it gets there, the host goes on at once."""
        device = torch.device(device)
        moved = {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}
        if device.type == "cuda":
            # From pageable memory the host would wait until all that was launched before is done. torch gives page-locked
            # memory to nobody else before the copy from it is over.
            moved = {name: t.pin_memory() if t.device.type == "cpu" else t for name, t in moved.items()}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in moved.items()})

    def look_ahead(self, depth: int) -> "Batch":
        """The same batch with what lies up to `depth` labels further on beside each position: called on whole sequences,
        before context parallelism cuts them, so that no rank needs a token of another's.

        A position looks no further than its document, where documents are kept apart (`document_ids`): it then counts
        nothing, and neither does any position behind it in that document, so that attention to it changes no loss.
        """
        if not depth:
            return self
        length = self.labels.shape[1]
        labels = self.labels.new_zeros((*self.labels.shape, depth))
        mask = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        for further in range(1, min(depth, length - 1) + 1):
            here, there = slice(0, length - further), slice(further, length)
            labels[:, here, further - 1] = self.labels[:, there]
            weight = 1.0 if self.loss_mask is None else self.loss_mask[:, there]
            if self.document_ids is not None:
                weight = weight * (self.document_ids[:, here] == self.document_ids[:, there])
            mask[:, here, further - 1] = weight
        return replace(self, further_labels=labels, further_mask=mask)

    @property
    def token_count(self) -> float:
        """Positions that count in the loss."""
        return float(self.tokens.numel() if self.loss_mask is None else self.loss_mask.sum().item())
