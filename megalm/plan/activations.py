"""Bytes that a layer keeps for its backward pass, tensor by tensor, and Korthikanti et al.'s closed forms."""

from dataclasses import dataclass

from megalm.architecture.blocks import MixtureSpec
from megalm.architecture.layers import LayerSpec, PredictionSpec, specify_layers
from megalm.config import ModelConfig
from megalm.config.precision import BYTES
from megalm.plan.layout import Layout


@dataclass(frozen=True)
class LayerActivations:
    """Bytes one rank keeps of one layer for one micro-batch, by tensor; and what backward needs for a moment."""

    saved: dict[str, float]
    recomputed: float
    """Bytes that exist only while the layer's own backward runs (recomputed activations)."""
    working: float
    """Gradients in flight inside the layer's backward."""

    @property
    def total(self) -> float:
        """Bytes kept between the forward and the backward pass."""
        return sum(self.saved.values())


def uses_math_attention(model: ModelConfig, layout: Layout, cpu: bool) -> bool:
    """Whether attention keeps its probabilities: capped scores, and on a CPU an additive mask (ALiBi), keep torch from its
    fused kernel."""
    return (cpu and model.position == "alibi" or model.attention_softcap is not None) and layout.context == 1


def count_mask_bytes(model: ModelConfig, layout: Layout) -> float:
    """Bytes of the masks that all layers of a rank share, without context parallelism: additive [A/t, S, S] with ALiBi, [S, S]
    of truth values for a window."""
    if layout.context > 1:
        return 0.0
    square, additive = float(model.seq_length) ** 2, model.position == "alibi"
    band = square if model.window is not None and model.window < model.seq_length else 0.0
    return band + (model.num_heads / layout.tensor * square * BYTES[layout.dtype] if additive else 0.0)


def estimate_layer_activations(
    model: ModelConfig, layout: Layout, layer: LayerSpec | None = None, *, cpu: bool = False
) -> LayerActivations:
    """Estimate what one layer (default: the model's last) keeps for one micro-batch under the layout's recompute mode."""
    size = BYTES[layout.dtype]
    tokens = model.seq_length * layout.micro_batch / layout.context
    t = layout.tensor
    along_sequence = t if layout.sequence else 1
    stream = tokens * model.hidden_size * size / along_sequence
    layer = layer or specify_layers(model)[-1]
    attention, mlp = layer.attention, layer.mlp
    query, key = attention.query_width / t, max(attention.key_width / t, float(attention.head_dim))
    dense = mlp.expert if isinstance(mlp, MixtureSpec) else mlp
    width = (mlp.shared_width if isinstance(mlp, MixtureSpec) else mlp.ffn_hidden_size) / t
    statistics = (2 if model.norm == "layernorm" else 1) * 4.0 * tokens / along_sequence
    heads = attention.num_heads / t
    parallel = 0 if layer.parallel else 1
    every = {
        "attention norm's input": stream + statistics,
        "query, key and value's input": stream,
        "queries, keys and values": tokens * (query + 2 * key) * size,
        "attention's output": tokens * query * size + 4.0 * tokens * heads,
        "MLP norm's input": stream * parallel + statistics,
        "MLP's input": stream,
        "activation's input": tokens * width * len(dense.inputs) * size,
        "activation's output": tokens * width * size,
    }
    if isinstance(layer, PredictionSpec):  # both norms' inputs, what is merged, and the last norm's input
        every["prediction's inputs"] = 6 * stream + 3 * statistics
    if attention.position == "rope" or attention.query_norm is not None:
        every["rotated queries and keys"] = tokens * (query + key) * size
    if attention.clip_qkv is not None:
        every["queries, keys and values before the clamp"] = tokens * (query + 2 * key) * size
    if uses_math_attention(model, layout, cpu):
        # Capped scores keep the tanh and the softmax in fp32 beside the probabilities.
        bytes_each = size if attention.softcap is None else 8.0 + size
        every["attention's probabilities"] = tokens * heads * model.seq_length * bytes_each
    for name in ("query, key and value's input", "MLP's input", "activation's output"):
        every[name] *= _share_of_kept_input(layout, size)
    if model.dropout:
        every["dropout masks"] = 2.0 * tokens * model.hidden_size / along_sequence
    if isinstance(mlp, MixtureSpec):
        every |= _count_expert_bytes(model, mlp, layout, tokens / t)
    # Backward goes through the MLP first, whose activations are free again when attention's gradients are there.
    between = every["activation's input"] + every["activation's output"] + every.get(EXPERTS_INPUT, 0.0)
    probabilities = every.get("attention's probabilities", 0.0)
    largest = every["activation's input"]
    if isinstance(mlp, MixtureSpec):
        largest += (
            _count_expert_rows(mlp, layout, tokens / t) * (mlp.expert.hidden_size + _part_width(mlp, layout)) * size
        )
    working = max(2 * stream + largest, 2 * probabilities - between)
    if layout.recompute == "full":
        return LayerActivations({"layer's input": stream}, sum(every.values()), working)
    if layout.recompute == "selective":
        again = (
            "query, key and value's input",
            "MLP's input",
            "activation's output",
            "rotated queries and keys",
            "queries, keys and values before the clamp",
            "attention's probabilities",
        )
        kept = {name: value for name, value in every.items() if name not in again}
        return LayerActivations(kept, sum(every.values()) - sum(kept.values()), working)
    return LayerActivations(every, 0.0, working)


def _share_of_kept_input(layout: Layout, size: int) -> float:
    """Bytes of a product's input that are kept for backward, over those of its dtype: 8-bit products keep what they
    multiply, unless it is gathered again, or the weight's gradient needs the input as it was."""
    narrow = layout.narrow
    if (
        narrow.recipe in ("none", "rowwise_wide")
        or layout.recompute != "none"
        or (layout.sequence and layout.tensor > 1)
    ):
        return 1.0
    return 1.0 - narrow.share + narrow.share / size


EXPERTS_INPUT = "experts' activation's input"


def _count_expert_rows(mlp: MixtureSpec, layout: Layout, tokens: float) -> float:
    """Count rows that the fullest rank of experts gets for a micro-batch of which each rank routes so many tokens: every token
    visits all parts of its experts."""
    return tokens * mlp.top_k * layout.expert_tensor * (layout.imbalance if layout.expert > 1 else 1.0)


def _part_width(mlp: MixtureSpec, layout: Layout) -> float:
    """Features of a row's first product, of a part of an expert."""
    return mlp.expert.ffn_hidden_size / layout.expert_tensor * len(mlp.expert.inputs)


def _count_expert_bytes(model: ModelConfig, mlp: MixtureSpec, layout: Layout, tokens: float) -> dict[str, float]:
    """Count what routing and experts keep: the router's input in fp32, its logits, the rows that came, what they became."""
    size, rows = BYTES[layout.dtype], _count_expert_rows(mlp, layout, tokens)
    every = {
        "router's input and logits": 4.0 * tokens * (mlp.num_experts + (model.hidden_size if size < 4 else 0)),
        "rows sent to experts": rows * model.hidden_size * size,
    }
    if layout.expert_rows is None:
        every[EXPERTS_INPUT] = rows * _part_width(mlp, layout) * size
    if mlp.expert.bias:
        every["experts' outputs"] = rows * model.hidden_size * size
    return every


def estimate_by_korthikanti(
    length: int, batch: int, hidden: int, heads: int, tensor: int = 1, sequence: bool = False, recompute: str = "none"
) -> float:
    """Estimate bytes of activations per layer and GPU of a 16-bit GPT with dropout and unfused attention.

    Source: Korthikanti et al. 2022 (arXiv:2205.05198), table 2.
    """
    sbh = float(length) * batch * hidden
    if recompute == "full":
        return 2 * sbh
    square = 5.0 * heads * length / hidden if recompute == "none" else 0.0
    if sequence:
        return sbh * (34 / tensor + square / tensor)
    return sbh * (10 + 24 / tensor + square / tensor)
