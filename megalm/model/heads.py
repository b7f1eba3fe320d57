"""How attention's heads lie on the tensor ranks."""

from typing import Any

import torch
from torch import nn

from megalm.architecture.blocks import AttentionSpec
from megalm.parallel.linear import Output, split_rows
from megalm.parallel.mesh import Axis
from megalm.parallel.slices import Piece, Role, Slice, attach


def query_heads(spec: AttentionSpec, axis: Axis, name: str) -> Output:
    """The query heads as the rows of the tensor called `name`.

    With a key/value head or more for each rank, those are dealt out with their query heads, as evenly as they can be:
    9 query heads on 3 key/value heads are 6 and 3 on two ranks. With fewer, ranks share a key/value head, and its query
    heads are divided.
    """
    own = spec.num_kv_heads >= axis.size
    unit = spec.head_dim * (spec.num_heads // spec.num_kv_heads if own else 1)
    return Output(name, spec.query_width, unit=unit, replicate=not own, uneven=own)


def locate_key_value_heads(spec: AttentionSpec, axis: Axis, name: str) -> Output:
    """Locate the key or the value heads as the rows of the tensor called `name`."""
    own = spec.num_kv_heads >= axis.size
    return Output(name, spec.key_width, unit=spec.head_dim, replicate=not own, uneven=own)


def locate_query_heads(spec: AttentionSpec, axis: Axis) -> slice:
    """Locate which of the query heads this rank computes."""
    first, rows, _, _ = split_rows(query_heads(spec, axis, "query"), axis)
    return slice(first // spec.head_dim, (first + rows) // spec.head_dim)


def make_head_parameter(spec: AttentionSpec, axis: Axis, name: str, **made: Any) -> nn.Parameter:
    """Make a number for each query head, where the head is: [A/t], at first 0."""
    rows = query_heads(spec, axis, name)
    heads = Output(name, spec.num_heads, rows.unit // spec.head_dim, rows.replicate, rows.uneven)
    first, count, _, replicas = split_rows(heads, axis)
    over = (axis.block(replicas),) if replicas > 1 else ()
    owner = axis.rank % replicas == 0
    piece = Piece(name, (spec.num_heads,), (first,), (count,), 0, replicas, owner, over)
    return attach(nn.Parameter(torch.zeros(count, **made)), Slice((piece,), role=Role.BIAS))
