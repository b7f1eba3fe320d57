"""What every layer of a chunk is told: one object, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megalm.config import ParallelConfig
from megalm.ops.attention_choice import AttentionChoice
from megalm.parallel import collectives
from megalm.parallel.block_attention import choose_among_blocks
from megalm.parallel.mesh import Axis, Mesh
from megalm.precision.policy import PrecisionPolicy
from megalm.precision.product import Product


@dataclass(frozen=True)
class LayerContext:
    """Where a chunk's layers compute, how their work is dealt over ranks, and in which number formats."""

    mesh: Mesh
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    policy: PrecisionPolicy = field(default_factory=PrecisionPolicy)
    device: torch.device | str | None = None
    """Of parameters; None: torch's default."""
    attention: AttentionChoice = field(default_factory=AttentionChoice)
    """Chooses what computes attention."""

    @cached_property
    def attention_kernels(self) -> AttentionChoice:
        """The same for this layout: over a context axis attention is put together of blocks."""
        return choose_among_blocks(self.attention) if self.mesh.context.size > 1 else self.attention

    @property
    def tensor(self) -> Axis:
        """The axis over which matrices are split."""
        return self.mesh.tensor

    @property
    def sequence(self) -> bool:
        """Whether the stream between blocks is split over the tensor axis, by positions."""
        return self.parallel.sequence and self.mesh.tensor.size > 1

    @property
    def recompute_parts(self) -> bool:
        """Whether norms, activations and attention's core are computed again in backward."""
        return self.parallel.recompute == "selective"

    def product(self, name: str, *, shares_input: bool = False) -> Product:
        """How products with the weight called `name` are computed; shares_input: another operation keeps its input for
        backward as it is."""
        product = self.policy.choose_product(name)
        # What is recomputed, or gathered again, takes no room, and a smaller form of it would.
        if self.parallel.recompute == "none" and not self.sequence and not shares_input:
            product = product.keeping()
        context = self.mesh.context
        if context.size == 1:
            return product

        def find_largest(values: Tensor) -> Tensor:
            return collectives.all_reduce(values, context, "max")

        return product.across(x=find_largest, grad=find_largest)  # tokens are split over the axis

    @property
    def of_parameters(self) -> dict[str, Any]:
        """Device and dtype, for the constructors of torch and of parameters."""
        return {"device": self.device, "dtype": self.policy.weights}

    @property
    def of_layers(self) -> dict[str, Any]:
        """The same, and whether the stream is split, for layers that are handed an axis."""
        return {"sequence_parallel": self.sequence, **self.of_parameters}
