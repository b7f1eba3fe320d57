"""The blocks that layers are composed of: what each is, which tensors it has, what it costs.

A new kind of block is a class here, with its module in `megalm.model` (see `megalm.model.transformer.MODULES`) and its
bytes and seconds in `megalm.plan.activations` and `megalm.plan.roofline`. Nothing else asks for the kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from megalm.architecture.positions import RopeSpec
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
    """What is normalised together: the residual stream, each head by itself with one weight for all (head) or with its own
    (each), or a token's heads together (heads)."""
    unit_offset: bool = False
    """It multiplies by 1 + weight."""

    def list_tensors(self, name: str) -> Tensors:
        """Yield its tensors under the name `name`."""
        yield f"{name}.weight", (self.size,)
        if self.bias:
            yield f"{name}.bias", (self.size,)


@dataclass(frozen=True)
class ProductSpec:
    """A matrix product of activations with a weight, or with several that are stacked, as the engine computes it."""

    name: str
    rows: int
    """Output features, of all tensor ranks."""
    columns: int
    """Input features."""
    split: str
    """What tensor ranks have parts of: rows, columns or none; experts: of one of several, whose rows of activations differ."""


class BlockSpec(ABC):
    """What reads the residual stream, normalised or not, and gives what is added to it."""

    @abstractmethod
    def list_tensors(self, name: str) -> Tensors:
        """Yield the block's tensors under the name `name`, in the order in which a token meets them."""

    def list_used_tensors(self, name: str) -> Tensors:
        """Yield the tensors that one token passes through."""
        return self.list_tensors(name)

    def list_states(self, name: str) -> Tensors:
        """Yield (name, shape) of what is kept in a checkpoint and is no parameter."""
        yield from ()

    def list_sums(self, name: str) -> dict[str, int]:
        """List names of what the block reports of each step in training, with their numbers of values."""
        return {}

    def list_products(self, name: str) -> Iterator[ProductSpec]:
        """Yield the products that may be computed in another format than the rest of the block."""
        yield from ()

    @cached_property
    def matrix_flops(self) -> float:
        """Forward FLOPs of one token's products with weights: two for each element of the matrices it passes through."""
        return 2.0 * sum(prod(shape) for _, shape in self.list_used_tensors("") if len(shape) > 1)

    def count_core_flops(self, length: int, causal: bool) -> float:
        """Forward FLOPs of one token's products with others of its sequence, averaged over positions.

        causal: those that it can see are counted, as Megatron-LM does (half the length without a window); else the square.
        """
        return 0.0


def count_attended(length: int, causal: bool, window: int | None = None) -> float:
    """Count positions that a token attends to on average; the causal half is length / 2."""
    seen = length if window is None else min(window, length)
    return seen - seen**2 / (2 * length) if causal else float(seen)


@dataclass(frozen=True)
class AttentionSpec(BlockSpec):
    """Causal self-attention with grouped key/value heads."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: str
    """rope (queries and keys are rotated), alibi (scores get biases), or what leaves attention as it is: learned, none."""
    rope: RopeSpec | None
    """The rotation where position is rope."""
    window: int | None
    """Tokens that a token sees, itself among them; None: all before it."""
    scale: float
    """What queries times keys are multiplied by."""
    softcap: float | None
    """Scores are kept below this by a tanh."""
    sinks: bool
    """A learned score of each head takes part in the softmax."""
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
        if self.sinks:
            yield f"{name}.sinks", (self.num_heads,)
        yield from list_linear_tensors(f"{name}.output", self.hidden_size, self.query_width, self.output_bias)

    def list_products(self, name: str) -> Iterator[ProductSpec]:
        yield ProductSpec(f"{name}.qkv", self.query_width + 2 * self.key_width, self.hidden_size, "rows")
        yield ProductSpec(f"{name}.output", self.hidden_size, self.query_width, "columns")

    def count_core_flops(self, length: int, causal: bool) -> float:
        """Count scores, and their product with the values."""
        return 4.0 * self.query_width * count_attended(length, causal, self.window)


@dataclass(frozen=True)
class LatentAttentionSpec(AttentionSpec):
    """Causal self-attention whose keys and values come out of one latent for each token; head_dim is plain_dim + rope_dim."""

    query_rank: int | None
    """Width of the queries' latent; None: queries are made of the hidden state."""
    key_rank: int
    """Width of the latent of keys and values."""
    plain_dim: int
    """Features of a query and a key that are not rotated."""
    rope_dim: int
    """Those that are; the keys' are one vector for all heads."""
    value_dim: int
    """Features of a value."""
    query_down_norm: NormSpec | None
    key_value_norm: NormSpec

    def list_tensors(self, name: str) -> Tensors:
        if self.query_rank is None or self.query_down_norm is None:
            yield from list_linear_tensors(f"{name}.query", self.query_width, self.hidden_size, False)
        else:
            yield from list_linear_tensors(f"{name}.query_down", self.query_rank, self.hidden_size, False)
            yield from self.query_down_norm.list_tensors(f"{name}.query_down_norm")
            yield from list_linear_tensors(f"{name}.query_up", self.query_width, self.query_rank, False)
        down, up = self.key_rank + self.rope_dim, self.num_heads * (self.plain_dim + self.value_dim)
        yield from list_linear_tensors(f"{name}.key_value_down", down, self.hidden_size, False)
        yield from self.key_value_norm.list_tensors(f"{name}.key_value_norm")
        yield from list_linear_tensors(f"{name}.key_value_up", up, self.key_rank, False)
        if self.sinks:
            yield f"{name}.sinks", (self.num_heads,)
        yield from list_linear_tensors(f"{name}.output", self.hidden_size, self.num_heads * self.value_dim, False)

    def list_products(self, name: str) -> Iterator[ProductSpec]:
        if self.query_rank is None:
            yield ProductSpec(f"{name}.query", self.query_width, self.hidden_size, "rows")
        else:
            yield ProductSpec(f"{name}.query_down", self.query_rank, self.hidden_size, "none")
            yield ProductSpec(f"{name}.query_up", self.query_width, self.query_rank, "rows")
        yield ProductSpec(f"{name}.key_value_down", self.key_rank + self.rope_dim, self.hidden_size, "none")
        up = self.num_heads * (self.plain_dim + self.value_dim)
        yield ProductSpec(f"{name}.key_value_up", up, self.key_rank, "rows")
        yield ProductSpec(f"{name}.output", self.hidden_size, self.num_heads * self.value_dim, "columns")

    def count_core_flops(self, length: int, causal: bool) -> float:
        """Count scores, and their product with the values."""
        seen = count_attended(length, causal, self.window)
        return 2.0 * self.num_heads * (self.head_dim + self.value_dim) * seen


@dataclass(frozen=True)
class MLPSpec(BlockSpec):
    """The position-wise MLP."""

    hidden_size: int
    ffn_hidden_size: int
    activation: str
    activation_limit: float
    """What clamped_swiglu clamps to."""
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

    def list_products(self, name: str) -> Iterator[ProductSpec]:
        yield ProductSpec(f"{name}.up", len(self.inputs) * self.ffn_hidden_size, self.hidden_size, "rows")
        yield ProductSpec(f"{name}.down", self.hidden_size, self.ffn_hidden_size, "columns")


@dataclass(frozen=True)
class MergeSpec(BlockSpec):
    """One matrix over two vectors of each token: what a prediction layer makes of a hidden state and a further token."""

    hidden_size: int
    init_std: float

    def list_tensors(self, name: str) -> Tensors:
        return list_linear_tensors(name, self.hidden_size, 2 * self.hidden_size, False)


@dataclass(frozen=True)
class RouterSpec:
    """How a token's experts are chosen and weighted; the settings of `model.moe` with the same names say more."""

    hidden_size: int
    num_experts: int
    top_k: int
    score: str
    weight_norm: float | None
    weight_scale: float
    groups: int
    top_groups: int
    group_scores: int
    bias: bool
    """In the linear map."""
    selection_bias: bool
    init_std: float

    def list_tensors(self, name: str) -> Tensors:
        """Yield its parameters under the name `name`."""
        return list_linear_tensors(name, self.num_experts, self.hidden_size, self.bias)


@dataclass(frozen=True)
class BalanceSpec:
    """What keeps the load of the experts even in training; the settings of `model.moe` say more."""

    kind: str
    loss: float
    z_loss: float
    bias_rate: float


@dataclass(frozen=True)
class MixtureSpec(BlockSpec):
    """A router that sends each token to `top_k` of the experts, and an MLP that every token passes through beside them."""

    expert: MLPSpec
    router: RouterSpec
    shared: MLPSpec | None
    shared_gate: bool
    balance: BalanceSpec

    @property
    def num_experts(self) -> int:
        """Experts that tokens are sent to."""
        return self.router.num_experts

    @property
    def top_k(self) -> int:
        """Experts that one token is sent to."""
        return self.router.top_k

    @property
    def shared_width(self) -> int:
        """Hidden features that every token passes through."""
        return 0 if self.shared is None else self.shared.ffn_hidden_size

    @property
    def used_width(self) -> int:
        """Hidden features that one token passes through."""
        return self.top_k * self.expert.ffn_hidden_size + self.shared_width

    def list_tensors(self, name: str) -> Tensors:
        return self._tensors(name, self.num_experts)

    def list_used_tensors(self, name: str) -> Tensors:
        return self._tensors(name, self.top_k)

    def list_products(self, name: str) -> Iterator[ProductSpec]:
        for product in self.expert.list_products(f"{name}.experts"):
            yield replace(product, split="experts")
        if self.shared is not None:
            yield from self.shared.list_products(f"{name}.shared_expert")

    def list_states(self, name: str) -> Tensors:
        """Yield (name, shape) of what is kept in a checkpoint and is no parameter."""
        if self.router.selection_bias:
            yield f"{name}.router.selection_bias", (self.num_experts,)
        if self.balance.kind == "global":
            yield f"{name}.router.load_shares", (self.num_experts,)

    def list_sums(self, name: str) -> dict[str, int]:
        """List names of what the block reports of each step in training, with their numbers of values."""
        return {
            **dict.fromkeys((f"{name}.router.counts", f"{name}.router.probability"), self.num_experts),
            "router/balance_loss": 1,
            "router/z_loss": 1,
        }

    def _tensors(self, name: str, experts: int) -> Tensors:
        yield from self.router.list_tensors(f"{name}.router")
        for index in range(experts):
            yield from self.expert.list_tensors(f"{name}.experts.{index}")
        if self.shared is not None:
            yield from self.shared.list_tensors(f"{name}.shared_expert")
        if self.shared_gate:
            yield f"{name}.shared_gate.weight", (1, self.expert.hidden_size)
