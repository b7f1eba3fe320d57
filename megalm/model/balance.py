"""What keeps a mixture's load even: losses on the router, and the bias that follows the load."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megalm.architecture.blocks import MixtureSpec
from megalm.model.auxiliary import Auxiliary
from megalm.model.router import Router
from megalm.parallel import collectives
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import Role, attach, make_replicated, slice_of


class Loads(NamedTuple):
    """How this rank's tokens were routed, for each set of tokens that a balance loss takes together.

    Shapes:  counts int64 [sets, E]; probability fp32 [sets, E], summed over tokens; log_z fp32 [T]
    """

    counts: Tensor
    probability: Tensor
    log_z: Tensor


class BalanceLoss(nn.Module):
    """coefficient * E sum_e f_e P_e over tokens, and the z-loss; f_e the share of the load, P_e the mean probability.

    Both are sums over tokens, as the objective is: N E sum f P = E / k sum_e (c_e / N) p_e for N tokens with counts c and
    probabilities that sum to p. The counts have no gradient, so a rank that knows those of all N tokens adds up its own
    tokens' part alone, and no gradient travels.

    sequence:     c of each sequence by itself, over the context and tensor ranks that share it: the same on every layout.
    global:       the shares of the whole global batch in the update before, kept in the checkpoint (even at first): the same
                  on every layout.
    micro_batch:  c of a data rank's micro-batch: changes with the number of data ranks and the micro-batch's size.

    Buffers: selection_bias and load_shares fp32 [E], the same on every rank; `megalm.train.balance` changes them, once a step
    Comm:    all-reduce of the counts over context and (where they share tokens) tensor ranks
    Source:  Fedus et al. 2021 (arXiv:2101.03961), eq. 4; DeepSeek-V3 (arXiv:2412.19437), sec. 2.1.2
    """

    selection_bias: Tensor | None
    load_shares: Tensor | None

    def __init__(self, spec: MixtureSpec, mesh: Mesh, *, name: str, device: torch.device | str | None) -> None:
        super().__init__()
        self.spec, self.name, self.mesh = spec, name, mesh
        self.coefficient, self.z_loss = spec.balance.loss, spec.balance.z_loss
        experts = spec.num_experts
        bias = torch.zeros(experts, device=device) if spec.router.selection_bias else None
        shares = torch.full((experts,), 1.0 / experts, device=device) if spec.balance.kind == "global" else None
        for part, state in (("selection_bias", bias), ("load_shares", shares)):
            self.register_buffer(part, state, persistent=False)
            if state is not None:
                slice_ = make_replicated(
                    f"{name}.router.{part}",
                    (experts,),
                    mesh.tensor,
                    partial_gradient=False,
                    role=Role.STATE,
                    initial=0.0,
                )
                attach(state, slice_)

    def _apply(self, fn: Any, recurse: bool = True) -> BalanceLoss:
        """Whatever the module is moved or cast to, its states follow to the device alone: they stay fp32, with their slices."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, state in before.items():
            moved = state.to(getattr(self, name).device)
            setattr(self, name, attach(moved, slice_of(state)))
        return self

    def choose(self, router: Router, logits: Tensor) -> tuple[Tensor, Tensor, Loads]:
        """Route tokens, sequence by sequence where the loss asks for it.

        Shapes: logits [s, B, E] -> weights [s B, k], experts [s B, k], Loads
        """
        if self.spec.balance.kind != "sequence" or not self.coefficient:
            routing = router(logits.flatten(0, 1), self.selection_bias)
            loads = Loads(routing.counts[None], routing.probability[None], routing.log_z)
            return routing.weights, routing.experts, loads
        each = [router(logits[:, row], self.selection_bias) for row in range(logits.shape[1])]
        weights, experts, log_z = (
            torch.stack([getattr(routing, part) for routing in each], 1).flatten(0, 1)
            for part in ("weights", "experts", "log_z")
        )
        counts, probability = (torch.stack([getattr(r, part) for r in each]) for part in ("counts", "probability"))
        return weights, experts, Loads(counts, probability, log_z)

    def report(self, y: Tensor, loads: Loads, auxiliary: Auxiliary) -> Tensor:
        """Hand out counts and losses; gives y, through which the losses are differentiated."""
        counts, probability, log_z = loads
        prefix = f"{self.name}.router"
        auxiliary.report(f"{prefix}.counts", counts.sum(0), own_part=True)
        auxiliary.report(f"{prefix}.probability", probability.sum(0), own_part=True)
        if self.coefficient:
            loss = self.coefficient * self._balance(counts, probability)
            y = auxiliary.attach(y, "router/balance_loss", loss, own_part=True)
        if self.z_loss:
            y = auxiliary.attach(y, "router/z_loss", self.z_loss * log_z.square().sum(), own_part=True)
        return y

    def _balance(self, counts: Tensor, probability: Tensor) -> Tensor:
        """This rank's tokens' part of the sum over tokens."""
        experts = self.spec.num_experts
        if self.load_shares is not None:
            return experts * (self.load_shares * probability).sum()
        for axis in (self.mesh.context, self.mesh.tensor):
            counts = collectives.all_reduce(counts.clone(), axis)
        assigned = counts.sum(-1, keepdim=True).clamp(min=1)
        return experts * (counts / assigned * probability).sum()
