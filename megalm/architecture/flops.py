"""FLOPs of training, exactly and by the usual rules of thumb; MFU and HFU with their definitions."""

from dataclasses import dataclass

from megalm.architecture.blocks import AttentionSpec
from megalm.architecture.layers import list_trained_layers
from megalm.architecture.tensors import count_parameters
from megalm.config.model import ModelConfig

DEFINITIONS = {
    "6nd": "6 N D: six FLOPs per parameter and token (Kaplan et al. 2020), attention's products not counted",
    "mosaic": "3 (2 N + 4 L d S) per token: all N parameters, attention in full (MosaicML's benchmark tables)",
    "full": "matrix products without the embedding's look-up, attention over the full square (Narayanan et al. 2021)",
    "causal": "matrix products without the embedding's look-up, attention over the causal half (Megatron-LM since 0.12)",
}
MFU = "MFU = model FLOPs (forward + backward, nothing counted twice) / (time x GPUs x peak)"
HFU = "HFU = FLOPs the hardware ran (model FLOPs + recomputed forwards) / (time x GPUs x peak)"


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs of one token through all layers, by part (a multiply and an add are two)."""

    attention_projections: float
    attention_core: float
    """Scores and their product with the values, averaged over positions."""
    mlp: float
    """The MLP; in a MoE model the router, the top_k experts and the shared ones."""
    logits: float

    @property
    def layers(self) -> float:
        """All layers."""
        return self.attention_projections + self.attention_core + self.mlp

    @property
    def total(self) -> float:
        """All layers and the logits."""
        return self.layers + self.logits


def count_forward_flops(model: ModelConfig, seq_length: int | None = None, causal: bool = True) -> ForwardFlops:
    """Forward FLOPs of one token of a sequence of `seq_length` (default: the model's), in training: with the layers that
    predict further tokens, and logits for each of them."""
    length = seq_length or model.seq_length
    blocks = [block for layer in list_trained_layers(model) for block in layer.blocks]
    attention = [block for block in blocks if isinstance(block, AttentionSpec)]
    return ForwardFlops(
        attention_projections=sum(block.matrix_flops for block in attention),
        attention_core=sum(block.count_core_flops(length, causal) for block in attention),
        mlp=sum(block.matrix_flops for block in blocks if not isinstance(block, AttentionSpec)),
        logits=2.0 * model.hidden_size * model.vocab_size * (1 + model.prediction.depth),
    )


def count_flops_per_token(model: ModelConfig, seq_length: int | None = None, causal: bool = True) -> float:
    """Exact training FLOPs of one token: three times the forward's (backward: two products for each forward one)."""
    return 3.0 * count_forward_flops(model, seq_length, causal).total


def count_flops_by_definition(model: ModelConfig, definition: str, seq_length: int | None = None) -> float:
    """Training FLOPs of one token by one of DEFINITIONS."""
    length = seq_length or model.seq_length
    if definition == "6nd":
        return 6.0 * count_parameters(model).active
    if definition == "mosaic":
        return 3.0 * (
            2.0 * count_parameters(model).active + count_forward_flops(model, length, causal=False).attention_core
        )
    return count_flops_per_token(model, length, causal=definition == "causal")


def count_hardware_flops_per_token(
    model: ModelConfig, seq_length: int | None = None, recompute: str = "none", causal: bool = True
) -> float:
    """Count FLOPs that are executed for one training token with activation recomputation.

    none: the model's own; selective: attention's core once more; full: all layers' forwards once more.
    The logits are computed again in no mode.
    """
    forward = count_forward_flops(model, seq_length, causal)
    extra = {
        "none": 0.0,
        "selective": forward.attention_core,
        "full": forward.layers,
    }[recompute]
    return 3.0 * forward.total + extra


def count_narayanan_batch_flops(model: ModelConfig, batch: int, recompute: bool = True) -> float:
    """Count the closed form of Narayanan et al. 2021, eq. 3 (GPT: ungated MLP of 4h): 96 or 72 B s L h^2 (...).

    With full recompute 96 B s L h^2 (1 + s/(6h) + V/(16Lh)); without 72 B s L h^2 (1 + s/(6h) + V/(12Lh)).
    """
    length, layers, hidden, vocabulary = model.seq_length, model.num_layers, model.hidden_size, model.vocab_size
    base, logits = (96, 16) if recompute else (72, 12)
    return (
        base
        * batch
        * length
        * layers
        * hidden**2
        * (1 + length / (6 * hidden) + vocabulary / (logits * layers * hidden))
    )


def compute_utilisation(flops_per_token: float, tokens_per_second: float, gpus: int, peak: float) -> float:
    """Compute share (0..1) of the GPUs' peak: MFU with model FLOPs, HFU with hardware FLOPs."""
    return flops_per_token * tokens_per_second / (gpus * peak)


def compute_mosaic_hfu_factor(recompute: str) -> float:
    """MosaicML's tables count a full recompute as four forwards in place of three, logits included."""
    return 4 / 3 if recompute == "full" else 1.0
