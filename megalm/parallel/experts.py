"""The experts of a mixture on the ranks that share them, and how tokens come to them and back.

The axis `expert_block` has all experts between its ranks. Rank (e, x) of it holds part x of F / expert_tensor hidden features
of the experts [e n, (e + 1) n), n = experts / expert. Each rank brings tokens of its own. A token visits every part of every
expert that it chose, and the parts' results, partial sums over the hidden features, add up where it came from: so parts of
experts need no communication beside the dispatch.
Source: parallel folding, arXiv:2504.14960
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalm import ops
from megalm.architecture.blocks import MLPSpec
from megalm.parallel import collectives, deferred
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.slices import Piece, Role, Slice, attach
from megalm.parallel.weight_gradient import GradientRoom
from megalm.precision.grouped import GroupedProduct

Activation = Callable[[Tensor], Tensor]
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows sorted by expert [N, H], their weights [N], counts [n]) -> their weighted outputs [N, H]."""


class Experts(nn.Module):
    """y = sum over a token's experts e of w_e W_down,e f(W_up,e x), dropless.

    The weight is applied in front of the down projection, which saves an activation; behind it where that has a bias.
    The two matrices of this rank's experts lie one expert under the other, so that each is a run of rows.

    Shapes:  x [T, H], weights fp32 [T, k], experts int64 [T, k] -> [T, H];  up [n f, H] with f = [gate; up] features of a
             part, down [n H, F / expert_tensor]; T may differ between the ranks, and be 0
    Comm:    two all-to-alls of rows and a small one of counts forward, two backward; or an all-gather and a reduce-scatter
    """

    def __init__(
        self,
        spec: MLPSpec,
        num_experts: int,
        context: LayerContext,
        activation: Activation,
        *,
        name: str,
    ) -> None:
        super().__init__()
        mesh, parallel, made = context.mesh, context.parallel, context.of_parameters
        self.activation, self.rows_at_once = activation, parallel.expert_rows
        self.local = num_experts // mesh.expert.size
        self.dispatch = _DISPATCHERS[parallel.expert_dispatch](mesh, self.local)
        first = mesh.expert.rank * self.local
        parts = mesh.expert_tensor
        width = spec.ffn_hidden_size // parts.size
        start, hidden = parts.rank * width, spec.hidden_size
        up: list[Piece] = []
        down: list[Piece] = []
        up_bias: list[Piece] = []
        down_bias: list[Piece] = []
        for place in range(self.local):
            expert = f"{name}.{first + place}"
            for each, part in enumerate(spec.inputs):
                row, whole = (place * len(spec.inputs) + each) * width, (spec.ffn_hidden_size, hidden)
                up.append(Piece(f"{expert}.{part}.weight", whole, (start, 0), (width, hidden), row))
                up_bias.append(Piece(f"{expert}.{part}.bias", whole[:1], (start,), (width,), row))
            whole, row = (hidden, spec.ffn_hidden_size), place * hidden
            down.append(Piece(f"{expert}.down.weight", whole, (0, start), (hidden, width), row))
            # Part 0 adds the bias; the others hold copies of it, which get its gradient by the sum.
            over = (parts,) if parts.size > 1 else ()
            owner = parts.rank == 0
            down_bias.append(Piece(f"{expert}.down.bias", (hidden,), (0,), (hidden,), row, parts.size, owner, over))
        self.up = _parameter(up, hidden, Role.EXPERT_MATRIX, spec.init_std, **made)
        self.down = _parameter(down, width, Role.EXPERT_MATRIX, spec.output_init_std, **made)
        self.products = tuple(context.product(f"{name}.{part}").for_experts() for part in ("up", "down"))
        self.products[0].check(width * len(spec.inputs), hidden)
        self.products[1].check(hidden, width)
        self.up_bias = _parameter(up_bias, None, Role.BIAS, 0.0, **made) if spec.bias else None
        self.down_bias = _parameter(down_bias, None, Role.BIAS, 0.0, **made) if spec.bias else None
        self.adds_down_bias = parts.rank == 0

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return self.dispatch(x, weights, experts, self.compute)

    def compute(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Compute the weighted outputs of rows that are sorted by this rank's experts."""
        dtype = rows.dtype  # the weights' own are fp32 where fully_shard leaves an expert on one rank
        up, down = (w.to(dtype) for w in (self.up, self.down))
        how = self.activation, self.rows_at_once, self.products
        if self.up_bias is None or self.down_bias is None:
            return _ExpertMLP.apply(rows, weights, up, None, down, counts, *how)
        y = _ExpertMLP.apply(rows, None, up, self.up_bias.to(dtype), down, counts, *how)
        y = y + _spread(self.down_bias.to(dtype), counts, rows.shape[0]) * float(self.adds_down_bias)
        return (y * weights.unsqueeze(-1)).to(dtype)


def _parameter(pieces: list[Piece], columns: int | None, role: Role, initial: float, **made: Any) -> nn.Parameter:
    rows = sum(piece.shape[0] for piece in pieces)
    parameter = nn.Parameter(torch.empty((rows,) if columns is None else (rows, columns), **made))
    return attach(parameter, Slice(tuple(pieces), role, initial, reduce_over="expert_data"))


# ------------------------------------------------------------------------------------------------------------- products
def _spread(bias: Tensor, counts: Tensor, rows: int) -> Tensor:
    """Each row's bias, of its expert. Shapes: bias [n F], counts [n] -> [rows, F]"""
    return bias.view(counts.numel(), -1).repeat_interleave(counts, 0, output_size=rows)


class _ExpertMLP(torch.autograd.Function):
    """y = w * f(x W_up^T + b) W_down^T for runs of rows, each with its expert's matrices; what is pointwise is computed again
    in backward, and with `rows_at_once` the first product, too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        counts: Tensor,
        activation: Activation,
        rows_at_once: int | None,
        products: tuple[GroupedProduct, GroupedProduct],
    ) -> Tensor:
        n = counts.numel()
        ctx.up, ctx.down, ctx.activation, ctx.rows_at_once, ctx.products = up, down, activation, rows_at_once, products
        out = x.new_empty((x.shape[0], down.shape[0] // n))
        projected = None
        for rows, part in _chunks(x.shape[0], counts, rows_at_once):
            projected = _project(products[0], x[rows], up, up_bias, part)
            hidden = _weighted(activation(projected), weights, rows)
            out[rows] = products[1].multiply(hidden, down.view(n, -1, down.shape[1]), part)
        ctx.save_for_backward(x, weights, up, up_bias, down, counts, None if rows_at_once else projected)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weights, up, up_bias, down, counts, projected = ctx.saved_tensors
        n = counts.numel()
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        grad_weights = None if weights is None else torch.empty_like(weights)
        grad_bias = None if up_bias is None else torch.zeros_like(up_bias)
        later = []  # (gradient, input) of both products, by chunk
        rooms = [GradientRoom(w) for w in (ctx.up, ctx.down)] if ctx.rows_at_once else []
        for rows, part in _chunks(x.shape[0], counts, ctx.rows_at_once):
            p = _project(ctx.products[0], x[rows], up, up_bias, part) if projected is None else projected
            with torch.enable_grad():
                p = p.detach().requires_grad_()
                activated = ctx.activation(p)
            plain = activated.detach()
            hidden = _weighted(plain, weights, rows)
            grad_hidden = ctx.products[1].multiply_gradient(grad[rows], down.view(n, -1, down.shape[1]), part)
            if grad_weights is not None:
                grad_weights[rows] = (grad_hidden.float() * plain).sum(-1)
            (grad_p,) = torch.autograd.grad(activated, p, _weighted(grad_hidden, weights, rows))
            if grad_bias is not None:
                _add_bias_gradient(grad_bias, grad_p, part)
            grad_x[rows] = ctx.products[0].multiply_gradient(grad_p, up.view(n, -1, up.shape[1]), part)
            operands = ((grad_p, x[rows], part), (grad[rows], hidden, part))
            if rooms:
                for room, product, each in zip(rooms, ctx.products, operands, strict=True):
                    room.add(_adder(product, n, each))
            else:
                later.append(operands)
        if rooms:
            found = [room.finish() for room in rooms]
        else:
            found = [
                deferred.compute_or_defer(
                    weight, _sum(weight, ctx.products[place], n, [operands[place] for operands in later])
                )
                for place, weight in enumerate((ctx.up, ctx.down))
            ]
        return grad_x, grad_weights, found[0], grad_bias, found[1], None, None, None, None


def _project(product: GroupedProduct, x: Tensor, up: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    projected = product.multiply(x, up.view(counts.numel(), -1, up.shape[1]), counts)
    return projected if bias is None else projected.add_(_spread(bias, counts, x.shape[0]))


def _weighted(x: Tensor, weights: Tensor | None, rows: slice) -> Tensor:
    return x if weights is None else (x * weights[rows].unsqueeze(-1)).to(x.dtype)


def _add_bias_gradient(out: Tensor, grad: Tensor, counts: Tensor) -> None:
    if out.is_meta:
        return
    for own, part in zip(out.view(counts.numel(), -1), grad.split(counts.tolist()), strict=True):
        own.add_(part.sum(0))


def _chunks(rows: int, counts: Tensor, rows_at_once: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, how many of each expert) in pieces of so many rows."""
    if rows_at_once is None or rows <= rows_at_once or counts.is_meta:
        yield slice(0, rows), counts
        return
    ends = counts.cumsum(0)
    for start in range(0, rows, rows_at_once):
        stop = min(start + rows_at_once, rows)
        yield slice(start, stop), ends.clamp(start, stop) - (ends - counts).clamp(start, stop)


def _adder(product: GroupedProduct, n: int, operands: tuple[Tensor, Tensor, Tensor]) -> Callable[[Tensor, bool], None]:
    grad, x, counts = operands

    def add(buffer: Tensor, empty: bool) -> None:
        product.add_weight_gradient(buffer.view(n, -1, buffer.shape[1]), grad, x, counts, empty=empty)

    return add


def _sum(
    weight: Tensor, product: GroupedProduct, n: int, operands: list[tuple[Tensor, Tensor, Tensor]]
) -> Callable[[], Tensor | None]:
    def compute() -> Tensor | None:
        with torch.no_grad():
            room = GradientRoom(weight)
            for each in operands:
                room.add(_adder(product, n, each))
            return room.finish()

    return compute


# ------------------------------------------------------------------------------------------------------------- dispatch
class AllToAll:
    """Each token's row goes to the ranks that have its experts, and comes back.

    permute by (rank, expert) -> all-to-all of counts, of rows -> reorder by (expert, rank) -> compute -> all the way back
    """

    def __init__(self, mesh: Mesh, local: int) -> None:
        self.axis, self.parts, self.local = mesh.expert_block, mesh.expert_tensor.size, local

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor, compute: Compute) -> Tensor:
        axis, local = self.axis, self.local
        slots, weights = self._visits(experts), weights.repeat_interleave(self.parts, 1)
        there = ops.moe_row_map(slots, axis.size * local)
        rows, weights = ops.moe_permute(x, there), weights.reshape(-1)[there.sources]
        if axis.size == 1:
            return ops.moe_unpermute(compute(rows, weights, there.counts), there)
        arriving = collectives.all_to_all(there.counts, axis)
        send, receive = (self._sizes(counts, rows.shape[0]) for counts in (there.counts, arriving))
        rows, weights = (collectives.deal(each, axis, send, receive) for each in (rows, weights))
        numbers = torch.arange(local, device=x.device).repeat(axis.size)
        by_expert = ops.moe_row_map(numbers.repeat_interleave(arriving, output_size=rows.shape[0]).unsqueeze(1), local)
        y = compute(ops.moe_permute(rows, by_expert), weights[by_expert.sources], by_expert.counts)
        back = collectives.deal(ops.moe_unpermute(y, by_expert), axis, receive, send)
        return ops.moe_unpermute(back, there)

    def _visits(self, experts: Tensor) -> Tensor:
        """Where each token goes, numbered by (rank of the block, expert of the rank). Shapes: [T, k] -> [T, k parts]"""
        if self.parts == 1:
            return experts
        rank = (experts // self.local * self.parts).unsqueeze(-1) + torch.arange(self.parts, device=experts.device)
        return (rank * self.local + (experts % self.local).unsqueeze(-1)).flatten(1)

    def _sizes(self, counts: Tensor, rows: int) -> list[int]:
        """Rows of each rank. On paper, where nobody chooses, the load is even."""
        if counts.is_meta:
            return [rows // self.axis.size + (rank < rows % self.axis.size) for rank in range(self.axis.size)]
        return counts.view(self.axis.size, self.local).sum(1).tolist()


class AllGather:
    """All tokens of the block go to all of its ranks, each computes what its experts have to do, and the sums go back.

    Simple, and without uneven messages; sends T (n - 1) rows of every rank, whatever they chose.
    """

    def __init__(self, mesh: Mesh, local: int) -> None:
        self.axis, self.local, self.first = mesh.expert_block, local, mesh.expert.rank * local
        self.num_experts = local * mesh.expert.size

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor, compute: Compute) -> Tensor:
        tokens, most = x.shape[0], self._most(x)
        if most > tokens:  # padding that no expert gets
            x, weights, experts = (
                torch.cat([t, t.new_full((most - tokens, *t.shape[1:]), fill)])
                for t, fill in ((x, 0), (weights, 0), (experts, -1))
            )
        x, weights = collectives.gather(x, self.axis), collectives.gather(weights, self.axis)
        experts = collectives.all_gather(experts, self.axis)
        own = ops.moe_row_map(experts - self.first, self.local)
        kept = self._kept(own)
        y = compute(ops.moe_permute(x, own)[:kept], weights.reshape(-1)[own.sources[:kept]], own.counts)
        y = torch.nn.functional.pad(y, (0, 0, 0, own.rows.numel() - kept))
        return collectives.scatter(ops.moe_unpermute(y, own), self.axis)[:tokens]

    def _kept(self, own: ops.RowMap) -> int:
        """Assignments to this rank's experts; the others come behind them. On paper, where nobody chooses, the load is even."""
        if own.counts.is_meta:
            return own.rows.numel() * self.local // self.num_experts
        return int(own.counts.sum())

    def _most(self, x: Tensor) -> int:
        """The largest number of tokens that a rank of the block brings. Comm: one number."""
        if self.axis.size == 1 or x.is_meta:
            return x.shape[0]
        return int(collectives.all_reduce(torch.tensor([x.shape[0]], device=x.device), self.axis, "max"))


_DISPATCHERS: dict[str, type[AllToAll] | type[AllGather]] = {"all_to_all": AllToAll, "all_gather": AllGather}


def own_tokens(x: Tensor, axis: Axis) -> Tensor:
    """This tensor rank's part of positions that all of them hold alike, so that each token is routed once; the last ranks may
    have fewer, or none. Shapes: [S, ..] -> [<= ceil(S/t), ..]. Comm: backward all-gather."""
    if axis.size == 1:
        return x
    length = x.shape[0]
    padding = -length % axis.size
    whole = torch.cat([x, x.new_zeros((padding, *x.shape[1:]))]) if padding else x
    share = whole.shape[0] // axis.size
    return collectives.split(whole, axis)[: min(share, max(0, length - axis.rank * share))]


def all_tokens(x: Tensor, axis: Axis, length: int) -> Tensor:
    """The way back from `own_tokens`. Shapes: -> [length, ..]. Comm: forward all-gather."""
    if axis.size == 1:
        return x
    share = -(-length // axis.size)
    if missing := share - x.shape[0]:
        x = torch.cat([x, x.new_zeros((missing, *x.shape[1:]))])
    return collectives.join(x, axis)[:length]
