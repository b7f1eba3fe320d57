"""Seconds of one layer's kernels on one rank: matrix products, attention, and what memory bandwidth decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from megalm.architecture.blocks import MixtureSpec, count_attended
from megalm.architecture.layers import LayerSpec, PredictionSpec
from megalm.architecture.shape import ModelShape
from megalm.config.precision import BYTES
from megalm.plan.layout import Layout, Narrow
from megalm.plan.machine import Machine

TILE = 128
"""Rows and columns of the output tile of a matrix product kernel."""
DEPTH = 512.0
"""Inner length at which half of a GPU product's time is start-up (loading the first tiles, writing the result)."""
CPU_DEPTH = 24.0
"""The same on a CPU, whose kernels reach their rate at small sizes."""
ATTENTION_BACKWARD = 2.5
"""Backward over forward FLOPs of fused attention: five products for two (Dao 2023, FlashAttention-2)."""
CONVERT_BYTES = 6.0
"""Bytes an element moves to become 8-bit floats in both orientations, from bf16: read twice, two of one byte written."""
ROWS_BYTES = 5.0
"""More where rows have scales: what is summed over differs between its two products, and each has a pass of its own."""
EMULATED_BYTES = 24.0
"""The same in emulation on a CPU: 8-bit floats are made, and read back as fp32 for the product."""
OPTIMIZER_BYTES = 30.0
"""Bytes a parameter moves through AdamW: gradient, master, two moments read; master, moments, weight written."""


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer for one micro-batch on one rank, without communication."""

    matmul_forward: float
    attention_forward: float
    memory_forward: float
    matmul_backward: float
    attention_backward: float
    memory_backward: float
    recompute: float

    @property
    def forward(self) -> float:
        """The forward pass."""
        return self.matmul_forward + self.attention_forward + self.memory_forward

    @property
    def backward(self) -> float:
        """The backward pass with what it computes again."""
        return self.matmul_backward + self.attention_backward + self.memory_backward + self.recompute


class Roofline:
    """Times of kernels on one rank of a machine, in one dtype."""

    def __init__(self, machine: Machine, dtype: str, narrow: Narrow = Narrow()) -> None:  # noqa: B008
        chip = machine.accelerator
        share = machine.gpus if machine.is_cpu else 1
        self.rate = machine.peak(dtype) * chip.matmul_efficiency
        self.attention_rates = {name: machine.peak(dtype) * value for name, value in chip.attention_efficiency.items()}
        self.bandwidth = chip.memory_bandwidth * chip.memory_efficiency / share
        self.processors = 1 if machine.is_cpu else chip.processors
        self.depth = CPU_DEPTH if machine.is_cpu else DEPTH
        self.launch = chip.launch
        self.narrow = narrow
        self.narrow_rate = 0.0
        """FLOP/s of 8-bit products; on a CPU they are emulated, in fp32."""
        if narrow.share:
            self.narrow_rate = machine.peak("fp32" if machine.is_cpu else "fp8") * chip.matmul_efficiency
        self.convert_bytes = (
            EMULATED_BYTES if machine.is_cpu else CONVERT_BYTES + ROWS_BYTES * narrow.recipe.startswith("rowwise")
        )
        self.size = BYTES[dtype]

    def matmul(self, rows: float, columns: float, inner: float, rate: float | None = None) -> float:
        """Seconds of [rows, inner] x [inner, columns]: the larger of computing and moving, and never less than a launch."""
        if rows <= 0 or columns <= 0 or inner <= 0:
            return 0.0
        flops = 2.0 * rows * columns * inner
        compute = flops / ((rate or self.rate) * self.time_fill(rows, columns) * inner / (inner + self.depth))
        moving = self.size * (rows * inner + inner * columns + rows * columns) / self.bandwidth
        return max(compute, moving, self.launch)

    def time_fill(self, rows: float, columns: float) -> float:
        """Share of the processors that the output's tiles keep busy, averaged over waves."""
        if self.processors == 1:
            return 1.0
        tiles = ceil(rows / TILE) * ceil(columns / TILE)
        return tiles / (ceil(tiles / self.processors) * self.processors)

    def attention(self, flops: float, direction: str) -> float:
        """Seconds of fused attention's `flops` forward or backward."""
        return max(flops / self.attention_rates[direction], self.launch)

    def moving(self, amount: float, kernels: int = 1) -> float:
        """Seconds to move `amount` bytes with elementwise kernels."""
        return max(amount / self.bandwidth, kernels * self.launch)

    def products(self, rows: float, columns: float, inner: float) -> tuple[float, float]:
        """(forward, backward) seconds of a linear layer: its product, and the input's and the weight's gradients."""
        forward = self.matmul(rows, columns, inner)
        return forward, self.matmul(rows, inner, columns) + self.matmul(inner, columns, rows)

    def layer_products(self, rows: float, columns: float, inner: float) -> tuple[float, float]:
        """The same of a layer that may be computed in 8-bit floats, whose operands are converted first; weights once a
        step."""
        wide, share = self.products(rows, columns, inner), self.narrow.share
        if not share or rows <= 0:
            return wide
        rate = self.narrow_rate
        last = None if self.narrow.recipe == "rowwise_wide" else rate
        forward = self.matmul(rows, columns, inner, rate) + self.moving(self.convert_bytes * rows * inner, 2)
        backward = self.matmul(rows, inner, columns, rate) + self.matmul(inner, columns, rows, last)
        backward += self.moving(self.convert_bytes * rows * columns, 2)
        return wide[0] + share * (forward - wide[0]), wide[1] + share * (backward - wide[1])


def estimate_layer_time(model: ModelShape, layer: LayerSpec, layout: Layout, roofline: Roofline) -> LayerTime:
    """Estimate seconds of one layer for one micro-batch."""
    length, t = model.seq_length, layout.tensor
    tokens = length * layout.micro_batch / layout.context
    hidden, size = model.hidden_size, roofline.size
    attention, mlp = layer.attention, layer.mlp
    query, key = attention.query_width / t, max(attention.key_width / t, float(attention.head_dim))
    dense = mlp.expert if isinstance(mlp, MixtureSpec) else mlp
    width = dense.ffn_hidden_size / t
    used = (mlp.used_width if isinstance(mlp, MixtureSpec) else mlp.ffn_hidden_size) / t
    along_sequence = t if layout.sequence else 1
    up = len(dense.inputs)
    products = [
        roofline.layer_products(tokens, query + 2 * key, hidden),
        roofline.layer_products(tokens, hidden, query),
    ]
    if isinstance(layer, PredictionSpec):
        products.append(roofline.products(tokens / along_sequence, hidden, 2 * hidden))
    if isinstance(mlp, MixtureSpec):
        local = max(1.0, mlp.num_experts / layout.expert)
        fullest = layout.imbalance if layout.expert > 1 else 1.0
        rows = tokens / t * mlp.top_k * layout.expert_tensor * fullest / local
        part = mlp.expert.ffn_hidden_size / layout.expert_tensor
        for columns, inner in ((up * part, hidden), (hidden, part)):
            forward, backward = roofline.products(rows, columns, inner)
            products.append((forward * local, backward * local))
        for columns, inner in ((up * mlp.shared_width / t, hidden), (hidden, mlp.shared_width / t)):
            products.append(roofline.layer_products(tokens, columns, inner))
        products.append(roofline.products(tokens / t, mlp.num_experts, hidden))
    else:
        products.append(roofline.layer_products(tokens, up * width, hidden))
        products.append(roofline.layer_products(tokens, hidden, width))
    core = 4.0 * tokens * (count_attended(length, causal=True, window=attention.window) + TILE / 2) * query
    rotated = 2 * (query + key) if attention.position == "rope" else 0.0
    routed = 4.0 * mlp.top_k * hidden if isinstance(mlp, MixtureSpec) else 0.0
    forward_bytes = tokens * size * (8 * hidden / along_sequence + rotated + (up + 1) * used + routed)
    backward_bytes = tokens * size * (10 * hidden / along_sequence + rotated + (2 * up + 1) * used + routed)
    matmul_forward, matmul_backward = (sum(column) for column in zip(*products, strict=True))
    attention_forward = roofline.attention(core, "forward")
    memory_forward = roofline.moving(forward_bytes, 6)
    again = {
        "none": 0.0,
        "selective": attention_forward + memory_forward,
        "full": matmul_forward + attention_forward + memory_forward,
    }[layout.recompute]
    return LayerTime(
        matmul_forward=matmul_forward,
        attention_forward=attention_forward,
        memory_forward=memory_forward,
        matmul_backward=matmul_backward,
        attention_backward=roofline.attention(ATTENTION_BACKWARD * core, "backward"),
        memory_backward=roofline.moving(backward_bytes, 8),
        recompute=again,
    )


def estimate_ends_time(model: ModelShape, layout: Layout, roofline: Roofline) -> tuple[float, float]:
    """(forward, backward) seconds of the logits and the loss for one micro-batch, on the last stage."""
    tokens = model.seq_length * layout.micro_batch / layout.context
    columns = model.vocab_size / layout.tensor
    forward, backward = roofline.products(tokens, columns, model.hidden_size)
    logits = tokens * columns * roofline.size
    return forward + roofline.moving(2 * logits, 2), backward + roofline.moving(2 * logits, 2)


def estimate_optimizer_time(held: float, roofline: Roofline) -> float:
    """Estimate seconds of the update of `held` parameters on one rank."""
    return roofline.moving(OPTIMIZER_BYTES * held)


HALF = 9 / 16
"""Share of a symmetric product that a CPU computes (`megalm.optim.rules.muon`)."""


def count_orthogonal_flops(shape: Sequence[int], *, half: bool) -> float:
    """Count FLOPs of one Newton-Schulz step of a matrix: X X^T, its square, and their product with X.

    half: the two symmetric ones are computed up to their diagonals.
    """
    short, long = sorted(shape)
    symmetric = 2.0 * short**2 * long + 2.0 * short**3
    return symmetric * (HALF if half else 1.0) + 2.0 * short**2 * long
