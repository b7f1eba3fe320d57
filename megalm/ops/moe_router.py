"""The router of a mixture of experts, and the two losses on it. Contract: csrc/moe_router/op.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalm.ops.backend import DTYPE_CODES, find_address, find_library, get_library, place, require, use_native
from megalm.ops.custom import CustomOp

_SCORES = {"softmax": 0, "sigmoid": 1}


class Routing(NamedTuple):
    """What the router decided for T tokens.

    weights [T, k] fp32 and experts [T, k] int64 in the order of choice; counts [E] int64, the tokens that chose each expert;
    probability [E] fp32, summed over tokens; log_z [T] fp32. counts and probability add up over micro-batches and ranks.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    probability: Tensor
    log_z: Tensor


def moe_router_reference(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_scores: int,
) -> Routing:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    log_scores = wide.log_softmax(-1) if score == "softmax" else torch.nn.functional.logsigmoid(wide)
    shares = scores if score == "softmax" else _shares_of(log_scores)
    ranks = scores.detach() if bias is None else scores.detach() + bias
    ranks = torch.where(ranks.isnan(), -torch.inf, ranks)
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    if groups:
        runs = ranks.unflatten(-1, (groups, -1)).sort(dim=-1, descending=True)[0][..., :group_scores].sum(-1)
        runs = torch.where(runs.isnan(), -torch.inf, runs)
        best = runs.argsort(dim=-1, descending=True, stable=True)[..., :top_groups]
        closed = torch.ones_like(runs, dtype=torch.bool).scatter(-1, best, False)
        closed = closed.repeat_interleave(ranks.shape[-1] // groups, -1)
        order = order.gather(-1, closed.gather(-1, order).to(torch.int8).argsort(dim=-1, stable=True))
    experts = order[..., :top_k]
    weights = _shares_of(log_scores.gather(-1, experts)) if normalize else scores.gather(-1, experts)
    counts = (experts.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)).sum((0, 1))
    return Routing(weights * scale, experts, counts, shares.sum(0), wide.logsumexp(-1))


def _shares_of(log_scores: Tensor) -> Tensor:
    """Each score's share of its row's sum, from the scores' logarithms: right however small all of them are.

    A constant added to the sum instead, so that nothing is divided by nothing, would let a router make its balance loss
    vanish by lowering all its logits. Shares of a row without any score are 0.
    """
    peak = log_scores.detach().amax(-1, keepdim=True)
    powers = (log_scores - torch.where(peak == -torch.inf, 0.0, peak)).exp()
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total == 0, 1.0, total)


def _forward(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: int,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_scores: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = get_library()
    outputs = _allocate(logits, bias, top_k)
    weights, chosen, counts, probability, log_z = outputs
    rows, experts = logits.shape
    where = place(logits)
    row_blocks = found.ROUTER_ROW_BLOCKS if where[0] < 0 else found.ROUTER_ROW_BLOCKS_CUDA
    blocks = min(rows, row_blocks)
    partial = logits.new_empty((blocks, experts), dtype=torch.float32)
    partial_counts = logits.new_empty((blocks, experts), dtype=torch.int64)
    found.router_forward(
        *where,
        DTYPE_CODES[logits.dtype],
        score,
        normalize,
        rows,
        experts,
        top_k,
        groups,
        top_groups,
        group_scores,
        row_blocks,
        scale,
        find_address(logits),
        find_address(bias),
        find_address(weights),
        find_address(chosen),
        find_address(log_z),
        find_address(probability),
        find_address(counts),
        find_address(partial),
        find_address(partial_counts),
    )
    return outputs


def _allocate(
    logits: Tensor, bias: Tensor | None, top_k: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, experts = logits.shape
    return (
        logits.new_empty((rows, top_k), dtype=torch.float32),
        logits.new_empty((rows, top_k), dtype=torch.int64),
        logits.new_empty((experts,), dtype=torch.int64),
        logits.new_empty((experts,), dtype=torch.float32),
        logits.new_empty((rows,), dtype=torch.float32),
    )


def _backward(
    dweights: Tensor | None,
    dprobability: Tensor | None,
    dlog_z: Tensor | None,
    logits: Tensor,
    chosen: Tensor,
    log_z: Tensor,
    score: int,
    normalize: bool,
    scale: float,
) -> Tensor:
    dlogits = torch.empty_like(logits)
    (rows, experts), top_k = logits.shape, chosen.shape[1]
    get_library().router_backward(
        *place(logits),
        DTYPE_CODES[logits.dtype],
        score,
        normalize,
        rows,
        experts,
        top_k,
        scale,
        find_address(dweights),
        find_address(dprobability),
        find_address(dlog_z),
        find_address(logits),
        find_address(chosen),
        find_address(log_z),
        find_address(dlogits),
    )
    return dlogits


def _backward_fake(
    dweights: Tensor | None,
    dprobability: Tensor | None,
    dlog_z: Tensor | None,
    logits: Tensor,
    *_: Any,
) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, _, ctx.score, ctx.normalize, ctx.scale, *_ = inputs
    ctx.save_for_backward(logits, output[1], output[4])


def _gradients(
    backward: Any,
    ctx: Any,
    dweights: Tensor | None,
    dexperts: Tensor | None,
    dcounts: Tensor | None,
    dprobability: Tensor | None,
    dlog_z: Tensor | None,
) -> Any:
    dlogits = None
    if not (dweights is None and dprobability is None and dlog_z is None):
        grads = [None if grad is None else grad.contiguous() for grad in (dweights, dprobability, dlog_z)]
        dlogits = backward(*grads, *ctx.saved_tensors, ctx.score, ctx.normalize, ctx.scale)
    return dlogits, None, None, None, None, None, None, None, None


_ROUTER = CustomOp(
    "moe_router",
    forward=_forward,
    forward_fake=_allocate,
    backward=_backward,
    backward_fake=_backward_fake,
    save=_save,
    gradients=_gradients,
)


def moe_router(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 0,
    top_groups: int = 0,
    group_scores: int = 1,
) -> Routing:
    """Each token's top_k experts and their weights, with what the balance losses need.

    score: softmax or sigmoid over the logits. normalize: a token's weights sum to `scale`; otherwise they are the scores
        themselves, times `scale`.
    bias: added to the scores for the choice only (balancing without a loss); it has no part in the weights and no gradient.
    groups, top_groups: the experts are `groups` equal runs, of which only the best `top_groups` may be chosen from; a run's
        score is the sum of its `group_scores` best. 0: no groups.
    Gradients flow from weights, probability and log_z to logits. Equal scores: the first expert. NaN counts as the lowest
    score: the choice is always top_k different experts.

    Shapes: logits [T, E], bias fp32 [E] -> Routing
    Source: Shazeer et al. 2017 (arXiv:1701.06538); DeepSeek-V3 2024 (arXiv:2412.19437), sec. 2.1.2
    """
    require(
        logits.dim() == 2 and logits.shape[1] > 0,
        f"moe_router: logits has shape {tuple(logits.shape)}; it must be [tokens, experts].",
    )
    experts = logits.shape[1]
    require(score in _SCORES, f"moe_router: score={score!r}; it must be softmax or sigmoid.")
    require(1 <= top_k <= experts, f"moe_router: top_k={top_k}; with {experts} experts it must be 1 to {experts}.")
    if bias is not None:
        require(
            tuple(bias.shape) == (experts,) and bias.dtype == torch.float32 and bias.device == logits.device,
            f"moe_router: bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; it must be float32 [{experts}] on "
            f"{logits.device}.",
        )
        bias = bias.detach().contiguous()
    if groups:
        require(
            1 <= groups <= experts and experts % groups == 0,
            f"moe_router: groups={groups}; it must divide the {experts} experts.",
        )
        run = experts // groups
        require(
            1 <= top_groups <= groups and top_k <= top_groups * run,
            f"moe_router: top_groups={top_groups}; it must be 1 to {groups}, and its runs of {run} experts must hold "
            f"top_k={top_k}.",
        )
        require(
            1 <= group_scores <= run, f"moe_router: group_scores={group_scores}; it must be 1 to {run}, a run's length."
        )
    else:
        require(top_groups == 0, f"moe_router: top_groups={top_groups} without groups; give groups, or leave it at 0.")
    found = find_library()
    fits = found is not None and experts <= found.ROUTER_EXPERTS and groups <= found.ROUTER_GROUPS
    if use_native("moe_router", logits=logits) and fits:
        return Routing(
            *_ROUTER(
                logits.contiguous(), bias, top_k, _SCORES[score], normalize, scale, groups, top_groups, group_scores
            )
        )
    return moe_router_reference(
        logits, bias, top_k, score, normalize, scale, groups, top_groups, group_scores if groups else 1
    )


def load_balance_loss(counts: Tensor, probability: Tensor, top_k: int) -> Tensor:
    """E * sum_e f_e P_e, 1 where the load is even: f_e the share of the assignments, P_e the mean probability of expert e.

    counts and probability may be those of one micro-batch, or summed over micro-batches and ranks first. Only probability
    has a gradient. Without any token it is 0.

    Shapes: counts [E], probability [E] -> scalar fp32
    Source: Fedus et al. 2021 (arXiv:2101.03961), eq. 4
    """
    require(
        counts.dim() == 1 and counts.shape == probability.shape,
        f"load_balance_loss: counts is {tuple(counts.shape)}, probability {tuple(probability.shape)}; both must be "
        "[experts].",
    )
    slots = counts.sum().clamp(min=1).to(probability.dtype)  # tokens x top_k
    return (counts.to(probability.dtype) * probability).sum() * (counts.shape[0] * top_k) / (slots * slots)


def router_z_loss(log_z: Tensor) -> Tensor:
    """Mean of log_z squared: keeps the logits small. Shapes: log_z [T] -> scalar.

    Source: Zoph et al. 2022 (arXiv:2202.08906), eq. 5
    """
    return log_z.square().sum() / max(1, log_z.numel())
