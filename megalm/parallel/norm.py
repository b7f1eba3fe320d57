"""RMSNorm and LayerNorm whose weights know how their gradients are summed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Role, attach, make_replicated


class Norm(nn.Module):
    """`norm(x)` -> y; `norm(x, residual)` -> (norm(x + residual), x + residual), fused.

    unit_offset: it multiplies by 1 + weight, which begins at 0.

    The weights are whole on every rank of the axis. Where each rank sees only a part of what they are applied to (its
    part of the sequence, or of the heads: sequence_parallel=True), their gradients are partial and get summed over
    the axis.

    Shapes: x [.., size] -> [.., size]; weight and bias [size]
    """

    def __init__(
        self,
        kind: str,
        size: int,
        *,
        name: str,
        eps: float,
        bias: bool = False,
        unit_offset: bool = False,
        axis: Axis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("rmsnorm", "layernorm"):
            raise ConfigError(f"model.norm={kind}: not one of rmsnorm, layernorm.")
        self.kind, self.eps, self.unit_offset = kind, eps, unit_offset

        def make(part: str, initial: float | str) -> nn.Parameter:
            parameter = nn.Parameter(torch.full((size,), float(initial == "ones"), device=device, dtype=dtype))
            slice_ = make_replicated(
                f"{name}.{part}", (size,), axis, partial_gradient=sequence_parallel, role=Role.NORM, initial=initial
            )
            return attach(parameter, slice_)

        self.weight = make("weight", 0.0 if unit_offset else "ones")
        self.bias = make("bias", 0.0) if bias and kind == "layernorm" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        weight = 1 + self.weight if self.unit_offset else self.weight
        if self.kind == "rmsnorm":
            if residual is None:
                return ops.rms_norm(x, weight, self.eps)
            return ops.add_rms_norm(x, residual, weight, self.eps)
        if residual is None:
            return ops.layer_norm(x, weight, self.bias, self.eps)
        return ops.add_layer_norm(x, residual, weight, self.bias, self.eps)
