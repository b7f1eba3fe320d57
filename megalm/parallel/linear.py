"""Matrices split over the tensor axis by their output features (column) or input features (row).

Source: Shoeybi et al. 2019 (arXiv:1909.08053), sec. 3; sequence parallelism: Korthikanti et al. 2022
        (arXiv:2205.05198), sec. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalm.config.errors import ConfigError
from megalm.config.layout import deal
from megalm.parallel import collectives
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Piece, Role, Slice, attach, make_replicated
from megalm.parallel.weight_gradient import deliver_weight_gradient
from megalm.precision.product import PLAIN, Product, Reduce

_ALONE = Axis("alone")


@dataclass(frozen=True)
class Output:
    """One of the global matrices stacked in a column-parallel layer.

    name: global name without `.weight`. features: its rows. unit: rows that stay together (head_dim).
    replicate: with fewer units than ranks, neighbouring ranks hold the same unit (key/value heads of grouped-query
    attention).
    uneven: units that the axis does not divide are dealt out, the first ranks getting one more (heads).
    Otherwise features that the axis does not divide are padded when unit is 1 (vocabulary), refused if not.
    """

    name: str
    features: int
    unit: int = 1
    replicate: bool = False
    uneven: bool = False


class _Linear(torch.autograd.Function):
    """Y = X W^T + b, with X gathered (sequence) or its gradient summed over the axis.

    Backward: the communication of dX = dY W runs while dW = dY^T X is computed; with `sequence`, X is gathered again
    while dX is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: Axis,
        sequence: bool,
        product: Product,
        keep: bool,
    ) -> Tensor:
        whole = collectives.all_gather(x, axis) if sequence else x
        y, kept, has_x = product.forward(whole, weight, bias, keep=keep and not sequence)
        ctx.save_for_backward(None if has_x else x, weight, *kept)
        # The parameter itself: under recomputation the saved tensor comes back as another object, through which neither
        # its sink nor, once the graph is gone, its AccumulateGrad node is found.
        ctx.weight = weight
        ctx.axis, ctx.sequence, ctx.product, ctx.has_bias = axis, sequence, product, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *kept = ctx.saved_tensors
        axis, sequence = ctx.axis, ctx.sequence
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        gathering = collectives.all_gather_async(x, axis) if sequence and want_weight else None
        products = ctx.product.backward(grad, tuple(kept))
        reducing = None
        if want_x:
            grad_x = products.compute_input_gradient(weight)
            reduce = collectives.reduce_scatter_async if sequence else collectives.all_reduce_async
            reducing = reduce(grad_x, axis)
        grad_weight = None
        if want_weight:
            whole = gathering.wait() if gathering else x
            rows = None if whole is None else whole.reshape(-1, whole.shape[-1])
            grad_weight = deliver_weight_gradient(ctx.weight, products, rows)
        grad_bias = None
        if ctx.has_bias and want_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return reducing.wait() if reducing else None, grad_weight, grad_bias, None, None, None, None


def column_parallel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: Axis,
    sequence_parallel: bool,
    product: Product = PLAIN,
) -> Tensor:
    """Y = X W^T + b with W's rows split over the axis.

    Shapes: x [S, B, H], or [S/t, B, H] with sequence_parallel -> y [S, B, F/t]; weight [F/t, H]
    Comm:   backward all-reduce(S); with sequence_parallel forward all-gather(S), backward all-gather(S) and
            reduce-scatter(S)
    """
    return _Linear.apply(x, weight, bias, axis, sequence_parallel and axis.size > 1, product, torch.is_grad_enabled())


def row_parallel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: Axis,
    sequence_parallel: bool,
    product: Product = PLAIN,
) -> Tensor:
    """Y = sum over ranks of X W^T, + b, with W's columns split over the axis.

    Shapes: x [S, B, F/t] -> y [S, B, H], or [S/t, B, H] with sequence_parallel; weight [H, F/t]
    Comm:   forward all-reduce(S); with sequence_parallel forward reduce-scatter(S), backward all-gather(S)
    """
    if axis.size == 1:
        return _Linear.apply(x, weight, bias, axis, False, product, torch.is_grad_enabled())
    partial = _Linear.apply(x, weight, None, _ALONE, False, product, torch.is_grad_enabled())
    y = collectives.scatter(partial, axis) if sequence_parallel else collectives.reduce(partial, axis)
    return y if bias is None else y + bias


def find_largest_over(axis: Axis) -> Reduce | None:
    """Find how the largest of all ranks of the axis is found; None on an axis of one."""
    return None if axis.size == 1 else lambda values: collectives.all_reduce(values, axis, "max")


def split_rows(output: Output, axis: Axis) -> tuple[int, int, int, int]:
    """This rank's part of an output: (first global row, real rows, local rows with padding, ranks that hold the same
    rows)."""
    units, rest = divmod(output.features, output.unit)
    if rest:
        raise ConfigError(
            f"{output.name}: {output.features} features are not a whole number of units of {output.unit}."
        )
    if units % axis.size == 0:
        rows = units // axis.size * output.unit
        return axis.rank * rows, rows, rows, 1
    if output.uneven and units > axis.size:
        first, count = deal(units, axis.size, axis.rank)
        return first * output.unit, count * output.unit, count * output.unit, 1
    if output.replicate and units < axis.size and axis.size % units == 0:
        replicas = axis.size // units
        return axis.rank // replicas * output.unit, output.unit, output.unit, replicas
    if output.unit == 1 and not output.replicate:
        rows = -(-units // axis.size)
        start = min(axis.rank * rows, units)
        return start, min(rows, units - start), rows, 1
    also = ", nor do the ranks divide by them" if output.replicate else ""
    raise ConfigError(
        f"{output.name}: {units} units of {output.unit} features do not divide over {axis.size} {axis.name} "
        f"ranks{also}. "
        f"Choose parallel.{axis.name} among the divisors of {units}."
    )


class ColumnParallelLinear(nn.Module):
    """Several matrices that read the same input, stacked: Y = [X W0^T, X W1^T, ...], their rows split over the tensor
    axis.

    Shapes: x [S, B, H], or [S/t, B, H] with sequence_parallel -> y [S, B, sum of local features]; `split_sizes`:
            local features of each
    Comm:   as `column_parallel`
    """

    def __init__(
        self,
        in_features: int,
        outputs: Sequence[Output],
        axis: Axis,
        *,
        bias: bool,
        sequence_parallel: bool,
        init_std: float,
        role: Role = Role.MATRIX,
        product: Product = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.sequence_parallel = axis, sequence_parallel
        largest = find_largest_over(axis)
        self.product = product.across(weight=largest, grad=largest)
        self.split_sizes: list[int] = []
        weights: list[Piece] = []
        biases: list[Piece] = []
        row = 0
        for output in outputs:
            start, rows, local, replicas = split_rows(output, axis)
            if rows:
                owner = axis.rank % replicas == 0
                over = (axis.block(replicas),) if replicas > 1 else ()
                weights.append(
                    Piece(
                        f"{output.name}.weight",
                        (output.features, in_features),
                        (start, 0),
                        (rows, in_features),
                        row,
                        replicas,
                        owner,
                        over,
                        unit=output.unit if output.unit > 1 else 0,
                    )
                )
                biases.append(
                    Piece(f"{output.name}.bias", (output.features,), (start,), (rows,), row, replicas, owner, over)
                )
            self.split_sizes.append(local)
            row += local
        self.product.check(row, in_features)
        self.weight = nn.Parameter(torch.empty(row, in_features, device=device, dtype=dtype))
        attach(self.weight, Slice(tuple(weights), role=role, initial=init_std))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(row, device=device, dtype=dtype))
            attach(self.bias, Slice(tuple(biases), role=Role.BIAS))

    def forward(self, x: Tensor, instead: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Y, or instead(x, weight): another use of the weight, which all that waits for this module's call waits for."""
        if instead is not None:
            return instead(x, self.weight)
        return column_parallel(x, self.weight, self.bias, self.axis, self.sequence_parallel, self.product)


class ReplicatedLinear(nn.Module):
    """Y = X W^T with W whole on every rank of the tensor axis, for a small W that all ranks' parts need.

    Without sequence_parallel every rank computes the same, and what reads Y must bring the sum of all ranks' gradients; with
    it each has its own positions, and the weight's gradient is a partial sum.

    Shapes: x [S, B, H], or [S/t, B, H] with sequence_parallel -> y [S or S/t, B, F]; weight [F, H]
    Comm:   none; with sequence_parallel the weight's gradient is summed over the axis
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        *,
        name: str,
        sequence_parallel: bool,
        init_std: float,
        role: Role = Role.MATRIX,
        product: Product = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        largest = find_largest_over(axis) if sequence_parallel else None
        self.product = product.across(x=largest, grad=largest)
        self.product.check(out_features, in_features)
        shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        slice_ = make_replicated(
            f"{name}.weight", shape, axis, partial_gradient=sequence_parallel, role=role, initial=init_std
        )
        attach(self.weight, slice_)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel(x, self.weight, None, _ALONE, False, self.product)


class RowParallelLinear(nn.Module):
    """Y = X W^T with W's input features split over the tensor axis: sums what a column-parallel layer spread out.

    Shapes: x [S, B, F/t] -> y [S, B, H], or [S/t, B, H] with sequence_parallel; weight [H, F/t]
    Comm:   as `row_parallel`
    Errors: ConfigError if the axis does not divide in_features / unit, and they are not to be dealt out `uneven`ly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        *,
        name: str,
        unit: int = 1,
        uneven: bool = False,
        bias: bool,
        sequence_parallel: bool,
        init_std: float,
        role: Role = Role.MATRIX,
        product: Product = PLAIN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.sequence_parallel = axis, sequence_parallel
        largest = find_largest_over(axis)
        self.product = product.across(x=largest, weight=largest)
        units = in_features // unit
        if in_features % unit or (units % axis.size and not (uneven and units > axis.size)):
            raise ConfigError(
                f"{name}: {in_features} input features in units of {unit} do not divide over {axis.size} {axis.name} "
                f"ranks. Choose parallel.{axis.name} among the divisors of {units}."
            )
        first, count = deal(units, axis.size, axis.rank)
        local = count * unit
        self.product.check(out_features, local)
        piece = Piece(f"{name}.weight", (out_features, in_features), (0, first * unit), (out_features, local))
        self.weight = nn.Parameter(torch.empty(out_features, local, device=device, dtype=dtype))
        attach(self.weight, Slice((piece,), role=role, initial=init_std))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
            attach(
                self.bias,
                make_replicated(
                    f"{name}.bias",
                    (out_features,),
                    axis,
                    partial_gradient=sequence_parallel,
                    role=Role.BIAS,
                    initial=0.0,
                ),
            )

    def forward(self, x: Tensor) -> Tensor:
        return row_parallel(x, self.weight, self.bias, self.axis, self.sequence_parallel, self.product)
