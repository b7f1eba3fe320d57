"""Norms over the residual stream."""

from megalm.architecture.blocks import NormSpec
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.norm import Norm


def make_norm(spec: NormSpec, context: LayerContext, *, name: str) -> Norm:
    """Make a norm over the residual stream's width."""
    return Norm(
        spec.kind,
        spec.size,
        name=name,
        eps=spec.eps,
        bias=spec.bias,
        unit_offset=spec.unit_offset,
        axis=context.tensor,
        **context.of_layers,
    )
