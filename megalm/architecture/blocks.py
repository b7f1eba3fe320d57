"""The blocks that layers are composed of: what each is, which tensors it has, what it costs.

A new kind of block is a class here, with its module in `megalm.model` (see `megalm.model.transformer.MODULES`) and its
bytes and seconds in `megalm.plan.activations` and `megalm.plan.roofline`. Nothing else asks for the kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from megalm.config.model import GATED

Tensors = Iterator[tuple[str, tuple[int, ...]]]
"""(name, shape) of tensors."""


def list_linear_tensors(name: str, rows: int, columns: int, bias: bool) -> Tensors:
    """Yield the tensors of y = W x + b."""
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


@dataclass(frozen=True)
class NormSpec:
    """A norm with its weight."""

    kind: str
    """rmsnorm or layernorm."""
    size: int
    """Elements of its weight."""
    eps: float
    bias: bool = False
    scope: str = "stream"
    """What is normalised together: the residual stream, each head by itself (head), or a token's heads together (heads)."""

    def list_tensors(self, name: str) -> Tensors:
        """Yield its tensors under the name `name`."""
        yield f"{name}.weight", (self.size,)
        if self.bias:
            yield f"{name}.bias", (self.size,)


class BlockSpec(ABC):
    """What reads the residual stream, normalised or not, and gives what is added to it."""

    @abstractmethod
    def list_tensors(self, name: str) -> Tensors:
        """Yield the block's tensors under the name `name`, in the order in which a token meets them."""

    def list_used_tensors(self, name: str) -> Tensors:
        """Yield the tensors that one token passes through."""
        return self.list_tensors(name)

    @cached_property
    def matrix_flops(self) -> float:
        """Forward FLOPs of one token's products with weights: two for each element of the matrices it passes through."""
        return 2.0 * sum(prod(shape) for _, shape in self.list_used_tensors("") if len(shape) > 1)

    def count_core_flops(self, attended: float) -> float:
        """Forward FLOPs of one token's products with `attended` other tokens."""
        return 0.0


@dataclass(frozen=True)
class AttentionSpec(BlockSpec):
    """Causal self-attention with grouped key/value heads."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: str
    """rope (queries and keys are rotated), alibi (scores get biases), or what leaves attention as it is: learned, none."""
    rope_interleaved: bool
    qkv_bias: bool
    output_bias: bool
    query_norm: NormSpec | None
    key_norm: NormSpec | None
    clip_qkv: float | None
    """Queries, keys and values are clamped to +- this."""
    init_std: float
    output_init_std: float
    """Initial standard deviation of the matrix that writes to the residual stream."""

    @property
    def query_width(self) -> int:
        """Features of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Features of all key (and of all value) heads together."""
        return self.num_kv_heads * self.head_dim

    def list_tensors(self, name: str) -> Tensors:
        for part, width in (("query", self.query_width), ("key", self.key_width), ("value", self.key_width)):
            yield from list_linear_tensors(f"{name}.{part}", width, self.hidden_size, self.qkv_bias)
        if self.query_norm is not None:
            yield from self.query_norm.list_tensors(f"{name}.query_norm")
        if self.key_norm is not None:
            yield from self.key_norm.list_tensors(f"{name}.key_norm")
        yield from list_linear_tensors(f"{name}.output", self.hidden_size, self.query_width, self.output_bias)

    def count_core_flops(self, attended: float) -> float:
        """Scores, and their product with the values."""
        return 4.0 * self.query_width * attended


@dataclass(frozen=True)
class MLPSpec(BlockSpec):
    """The position-wise MLP."""

    hidden_size: int
    ffn_hidden_size: int
    activation: str
    bias: bool
    init_std: float
    output_init_std: float
    """Initial standard deviation of the matrix that writes to the residual stream."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the matrices that read the residual stream."""
        return ("gate", "up") if self.activation in GATED else ("up",)

    def list_tensors(self, name: str) -> Tensors:
        for part in self.inputs:
            yield from list_linear_tensors(f"{name}.{part}", self.ffn_hidden_size, self.hidden_size, self.bias)
        yield from list_linear_tensors(f"{name}.down", self.hidden_size, self.ffn_hidden_size, self.bias)


@dataclass(frozen=True)
class MixtureSpec(BlockSpec):
    """A router that sends each token to `top_k` of the experts, and shared ones that every token passes through."""

    expert: MLPSpec
    num_experts: int
    top_k: int
    num_shared_experts: int

    @property
    def used_experts(self) -> int:
        """Experts that one token passes through."""
        return self.top_k + self.num_shared_experts

    def list_tensors(self, name: str) -> Tensors:
        return self._tensors(name, self.num_experts)

    def list_used_tensors(self, name: str) -> Tensors:
        return self._tensors(name, self.top_k)

    def _tensors(self, name: str, experts: int) -> Tensors:
        yield f"{name}.router.weight", (self.num_experts, self.expert.hidden_size)
        for index in range(experts):
            yield from self.expert.list_tensors(f"{name}.experts.{index}")
        for index in range(self.num_shared_experts):
            yield from self.expert.list_tensors(f"{name}.shared_experts.{index}")
