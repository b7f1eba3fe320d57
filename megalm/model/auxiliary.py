"""Losses and sums from anywhere in the model: attached to the activations, so that any pipeline stage can have them."""

from typing import Any

from torch import Tensor
from torch.autograd import Function


class _AttachLoss(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.scale = scale  # not saved by autograd, which would refuse that it is set anew for the next step
        ctx.shape, ctx.dtype = loss.shape, loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient, ctx.scale.to(ctx.dtype).expand(ctx.shape), None


def attach_loss(hidden: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """`hidden` as it is; when backward passes through it, scale * loss is differentiated, too.

    So a loss needs no way of its own to the last stage: the gradient that comes back to this stage brings it along.

    Args:
        loss: a sum over this rank's tokens, any shape; what is not a scalar counts as its sum.
        scale: 0-dim, read in backward: what the step multiplies its objective by.
    """
    return _AttachLoss.apply(hidden, loss, scale)


class Auxiliary:
    """What the layers of one forward pass hand out beside the activations: named sums, and losses on the way.

    A tensor rank reports the whole of its data rank's sums, as all of them compute alike; with `own_part`, the sum over the
    tokens that it alone has.

    scale: 0-dim tensor that the executor sets to the step's factor on the objective, before the first pass.
    tensor_ranks: how many report.
    """

    def __init__(self, scale: Tensor, tensor_ranks: int = 1) -> None:
        self.scale, self.tensor_ranks = scale, tensor_ranks
        self.sums: dict[str, Tensor] = {}

    def report(self, name: str, value: Tensor, *, own_part: bool = False) -> None:
        """Add to a named sum of the step, which every rank declares (`Transformer.reported`)."""
        value = value.detach().float()
        if own_part:  # the step's message divides by the tensor ranks
            value = value * self.tensor_ranks
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def attach(self, hidden: Tensor, name: str, loss: Tensor, *, own_part: bool = False) -> Tensor:
        """Add a loss (a sum over this rank's tokens) to what is minimised, and report it; goes on with what it returns."""
        self.report(name, loss.sum(), own_part=own_part)
        return attach_loss(hidden, loss, self.scale)
