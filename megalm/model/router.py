"""The router of a mixture of experts: each token's experts and their weights, in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm import ops
from megalm.architecture.blocks import RouterSpec
from megalm.ops import Routing
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Role, attach, make_replicated


class Router(nn.Module):
    """z = W x (+ b), s = softmax(z) or sigmoid(z); the top_k of s + selection bias, weighted by s (see RouterSpec).

    The product is fp32 whatever the dtype of weights and activations: choices are discontinuous. Every rank routes tokens of
    its own, so the gradients are partial over the tensor axis.

    Shapes:  x [T, H] -> Routing;  weight [E, H], selection_bias fp32 [E] (no parameter: no gradient, decay or cast)
    Comm:    none; the gradients are summed over the tensor axis
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        spec: RouterSpec,
        axis: Axis,
        *,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size, **made))
        self.bias = nn.Parameter(torch.zeros(spec.num_experts, **made)) if spec.bias else None
        for part, role, initial in (("weight", Role.ROUTER, spec.init_std), ("bias", Role.BIAS, 0.0)):
            parameter = getattr(self, part)
            if parameter is not None:
                shape = tuple(parameter.shape)
                slice_ = make_replicated(
                    f"{name}.{part}", shape, axis, partial_gradient=True, role=role, initial=initial
                )
                attach(parameter, slice_)

    def logits(self, x: Tensor) -> Tensor:
        """fp32 [T, E]."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)

    def forward(self, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """Choose by fp32 logits."""
        spec = self.spec
        plain = spec.weight_norm in (None, 1.0)
        routing = ops.moe_router(
            logits,
            spec.top_k,
            score=spec.score,
            normalize=spec.weight_norm == 1.0,
            scale=spec.weight_scale if plain else 1.0,
            bias=selection_bias,
            groups=spec.groups,
            top_groups=spec.top_groups,
            group_scores=spec.group_scores if spec.groups else 1,
        )
        if plain:
            return routing
        assert spec.weight_norm is not None
        norms = torch.linalg.vector_norm(routing.weights, spec.weight_norm, dim=-1, keepdim=True)
        return routing._replace(weights=routing.weights / norms * spec.weight_scale)
