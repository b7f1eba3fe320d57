"""The embedding table split over the tensor axis by vocabulary rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalm.parallel import collectives
from megalm.parallel.linear import Output, split_rows
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Piece, Role, Slice, attach
from megalm.parallel.weight_gradient import GradientSink


class _Lookup(torch.autograd.Function):
    """Rows of the table. On a CPU the gradient's rows are added straight to the optimizer's buffer: a dense gradient
    of the whole table, nearly all zeros, would be written and read again for every micro-batch."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight = weight
        return F.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        sink: GradientSink | None = getattr(ctx.weight, "gradient_sink", None)
        if sink is None or not sink.active or grad.device.type != "cpu":
            return None, torch.ops.aten.embedding_dense_backward(grad, rows, ctx.weight.shape[0], -1, False)
        buffer, empty = sink.open()
        if empty:
            buffer.zero_()
        buffer.index_add_(0, rows.reshape(-1), grad.reshape(-1, grad.shape[-1]).to(buffer.dtype))
        sink.close()
        return None, None


class VocabularyParallelEmbedding(nn.Module):
    """Rows of a table: each rank looks up the tokens in its part of the vocabulary, and the parts are summed.

    Rank r holds rows [r n, (r + 1) n) with n = ceil(V / t); rows past the vocabulary are zero padding.

    Shapes: tokens [S, B] -> [S, B, H], or [S/t, B, H] with sequence_parallel; weight [ceil(V/t), H]
    Comm:   forward all-reduce(S); with sequence_parallel forward reduce-scatter(S), backward all-gather(S)
    Source: Shoeybi et al. 2019 (arXiv:1909.08053), sec. 3
    """

    def __init__(
        self,
        vocab_size: int,
        hidden: int,
        axis: Axis,
        *,
        name: str,
        sequence_parallel: bool,
        init_std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.sequence_parallel = axis, sequence_parallel
        self.start, rows, local, _ = split_rows(Output(name, vocab_size), axis)
        self.weight = nn.Parameter(torch.empty(local, hidden, device=device, dtype=dtype))
        piece = Piece(f"{name}.weight", (vocab_size, hidden), (self.start, 0), (rows, hidden))
        attach(self.weight, Slice((piece,) if rows else (), role=Role.EMBEDDING, initial=init_std, shared=True))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.axis.size == 1:
            return _Lookup.apply(tokens, self.weight)
        local = tokens - self.start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        x = _Lookup.apply(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.sequence_parallel:
            return collectives.scatter(x, self.axis)
        return collectives.reduce(x, self.axis)
