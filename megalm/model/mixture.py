"""A mixture of experts in place of the MLP: router, experts, and what every token passes through beside them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megalm.architecture.blocks import MixtureSpec
from megalm.model.balance import BalanceLoss
from megalm.model.mlp import MLP, activate
from megalm.model.positions import Where
from megalm.model.router import Router
from megalm.parallel.experts import Experts, all_tokens, own_tokens
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Role, attach, make_replicated


class Mixture(nn.Module):
    """y = sum over the chosen experts of w_e E_e(x), + shared(x).

    Every token is routed once, by one rank: with sequence parallelism by the tensor rank that has it; without, where all of
    them do, by the one whose turn it is. What the load asks for (counts, losses) leaves through `where.auxiliary`, in training
    alone; a forward pass changes no state.

    Shapes:  x [S/t or S, B, H] -> the same
    Comm:    those of the dispatch (`megalm.parallel.experts`) and of the shared MLP; without sequence parallelism an
             all-gather(S) over the tensor axis, forward and backward
    Source:  Shazeer et al. 2017 (arXiv:1701.06538); Dai et al. 2024 (arXiv:2401.06066) for shared experts
    """

    def __init__(self, spec: MixtureSpec, context: LayerContext, *, name: str) -> None:
        super().__init__()
        tensor, made = context.tensor, context.of_parameters
        self.spec, self.name = spec, name
        self.split = Axis("tensor") if context.sequence else tensor
        """Over which ranks tokens that all of them hold are shared out."""
        self.router = Router(spec.router, tensor, name=f"{name}.router", **made)
        activation = partial(activate, spec.expert.activation, limit=spec.expert.activation_limit)
        self.experts = Experts(spec.expert, spec.num_experts, context, activation, name=f"{name}.experts")
        self.balance = BalanceLoss(spec, context.mesh, name=name, device=context.device)
        self.shared_expert = MLP(spec.shared, context, name=f"{name}.shared_expert") if spec.shared else None
        self.shared_gate: nn.Parameter | None = None
        if spec.shared_gate:
            self.shared_gate = nn.Parameter(torch.empty(1, spec.expert.hidden_size, **made))
            slice_ = make_replicated(
                f"{name}.shared_gate.weight",
                (1, spec.expert.hidden_size),
                tensor,
                partial_gradient=context.sequence,
                role=Role.ROUTER,
                initial=spec.router.init_std,
            )
            attach(self.shared_gate, slice_)

    def forward(self, x: Tensor, where: Where) -> Tensor:
        own = own_tokens(x, self.split)
        routed = all_tokens(self.route(own, where), self.split, x.shape[0])
        if self.shared_expert is None:
            return routed
        shared = self.shared_expert(x, where)
        if self.shared_gate is not None:
            shared = shared * torch.sigmoid(nn.functional.linear(x, self.shared_gate))
        return routed + shared

    def route(self, x: Tensor, where: Where) -> Tensor:
        """Send this rank's tokens to their experts and back. Shapes: [s, B, H] -> the same"""
        logits = self.router.logits(x)
        bias = self.balance.selection_bias
        rows = x.flatten(0, 1)
        if not (self.training and where.auxiliary is not None):
            routing = self.router(logits.flatten(0, 1), bias)
            return self.experts(rows, routing.weights, routing.experts).view_as(x)
        weights, experts, loads = self.balance.choose(self.router, logits)
        y = self.experts(rows, weights, experts)
        return self.balance.report(y, loads, where.auxiliary).view_as(x)
