"""The position-wise MLP, plain or gated."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm import ops
from megalm.architecture.blocks import MLPSpec
from megalm.model.positions import Where
from megalm.model.recompute import keep_function_of
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.linear import ColumnParallelLinear, Output, RowParallelLinear

_SWISH = 1.702
"""Factor inside clamped_swiglu's sigmoid, by which the gate comes close to a GELU (Hendrycks and Gimpel 2016)."""


def activate(kind: str, x: Tensor, limit: float) -> Tensor:
    """The MLP's function; gated kinds take [gate; up] stacked, [.., 2F] -> [.., F]. limit: what clamped_swiglu clamps to.

    The gradient of swiglu and geglu is written over x, which nothing but this function's own recomputation may read later.
    """
    if kind == "swiglu":
        return ops.swiglu(x, inplace_backward=True)
    if kind in ("geglu", "geglu_tanh"):
        return ops.geglu(x, "tanh" if kind == "geglu_tanh" else "none", inplace_backward=True)
    if kind == "clamped_swiglu":
        gate, up = x.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(_SWISH * gate)
    if kind == "relu":
        return F.relu(x)
    if kind == "relu2":
        return F.relu(x).square()
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class MLP(nn.Module):
    """y = W_down f(W_up x), with F/t hidden features on each tensor rank.

    Shapes:  x [S/t or S, B, H] -> y the same
    Comm:    those of the column- and row-parallel projections
    Source:  Shazeer 2020 (arXiv:2002.05202) for the gated kinds
    """

    def __init__(self, spec: MLPSpec, context: LayerContext, *, name: str) -> None:
        super().__init__()
        self.activation, self.limit = spec.activation, spec.activation_limit
        self.up = ColumnParallelLinear(
            spec.hidden_size,
            [Output(f"{name}.{part}", spec.ffn_hidden_size) for part in spec.inputs],
            context.tensor,
            bias=spec.bias,
            init_std=spec.init_std,
            product=context.product(f"{name}.up"),
            **context.of_layers,
        )
        self.down = RowParallelLinear(
            spec.ffn_hidden_size,
            spec.hidden_size,
            context.tensor,
            name=f"{name}.down",
            bias=spec.bias,
            init_std=spec.output_init_std,
            product=context.product(f"{name}.down"),
            **context.of_layers,
        )
        self.recompute_activation = context.recompute_parts

    def forward(self, x: Tensor, where: Where) -> Tensor:
        """Every block of a layer is told where its tokens stand; this one treats them all alike."""
        projected = self.up(x)
        hidden = activate(self.activation, projected, self.limit)
        if not self.recompute_activation:
            return self.down(hidden)
        with keep_function_of(hidden, lambda: activate(self.activation, projected, self.limit)):
            return self.down(hidden)
