"""The probe: one forward pass over a fixed held-out batch tells bad data from damaged weights.

If the training loss is odd and the probe's is not, the batch was bad. If the probe's is odd as well, the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalm.data.batch import Batch
from megalm.parallel.collectives import all_reduce
from megalm.parallel.slices import Box
from megalm.train.mean_loss import Evaluator


class Probe:
    """Loss of a few held-out sequences, the same at every call.

    Args:
        batches: this rank's micro-batches of the probe; as many on every rank, or none on all of them.
    """

    def __init__(self, evaluator: Evaluator, batches: Sequence[Batch]):
        self.evaluator, self.batches = evaluator, list(batches)

    def loss(self) -> float:
        """Mean loss over the probe's tokens, the same on every rank; NaN or infinite if the weights are that far gone.

        Comm: that of `Evaluator.mean_loss`
        """
        return self.evaluator.mean_loss(self.batches)


@contextmanager
def use_other_weights(trainer: Any, boxes: Sequence[Box], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the model has these weights (`tensors`, one for each of `boxes`, moments left out); after it every
    weight is again, bit by bit, what it was, damaged ones too.

    Comm: those of `optimizer.gather_parameters()`, once
    """
    optimizer = trainer.optimizer
    optimizer.wait_weights()
    taken = [(box.tensor, other) for box, other in zip(boxes, tensors, strict=True) if not _is_moment(box)]
    computed = [_local(parameter) for chunk in trainer.model_chunks for parameter in chunk.parameters()]
    kept = [(tensor, tensor.cpu().clone()) for tensor in [*(tensor for tensor, _ in taken), *computed]]
    try:
        for tensor, other in taken:
            tensor.copy_(other)
        optimizer.gather_parameters()
        yield
    finally:
        optimizer.wait_weights()
        for tensor, old in kept:
            tensor.copy_(old)


def _is_moment(box: Box) -> bool:
    return box.name.startswith("optimizer.")


def _local(parameter: Tensor) -> Tensor:
    inside = parameter.detach()
    return inside.to_local() if isinstance(inside, DTensor) else inside


BROKEN_WEIGHT = 1e6
"""No healthy weight is larger; a flipped high exponent bit makes one of 1e30, whose forward pass may look normal."""


def has_broken_weights(chunks: Sequence[torch.nn.Module], mesh: Any) -> bool:
    """Whether some weight on some rank is not finite, or absurdly large.

    Comm: all-reduce (max) of 1 number over the world.
    """
    largest = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.numel():
                size = parameter.detach().abs().amax().double()
                largest = torch.maximum(largest, torch.nan_to_num(size, nan=math.inf))
    return all_reduce(largest.reshape(1), mesh.world, "max").item() > BROKEN_WEIGHT


def reach_verdict(kind: str, excess: float | None, limit: float) -> str:
    """data | nonfinite | weights | unknown, from the kind of observation and the probe's loss above its last clean one.

    excess: nats; None without a probe; not finite if the probe's loss was not.
    """
    if kind == "update":
        return "weights"  # the optimizer's state or the learning rate: going back is the answer, as for damaged weights
    if excess is None:
        return {"shift": "weights", "nonfinite": "nonfinite"}.get(kind, "unknown")
    if not excess <= limit:  # NaN is damage, too
        return "weights"
    return "nonfinite" if kind == "nonfinite" else "data"
