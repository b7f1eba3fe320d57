"""Cuts the model into pipeline stages by what they cost, not by how many layers they have. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalm.config.errors import ConfigError
from megalm.config.model import ModelConfig


@dataclass(frozen=True)
class LayerCosts:
    """Forward FLOPs of one token: of each layer, of what the first stage adds, and of what the last adds.

    Backward is twice the forward for all of them, so shares of the one are shares of the other.
    """

    layers: tuple[float, ...]
    embedding: float
    output: float


def layer_costs(model: ModelConfig) -> LayerCosts:
    """What each part of the model costs, per token of a sequence of model.seq_length.

    layer:      2 * (matrix elements used) + 2 * S * heads * d   (causal scores and their weighted sum; half of S^2)
    output:     2 * H * V, plus 5 V for the cross-entropy's exponentials and sums
    embedding:  a table look-up and its gradient's scatter move H elements and compute nearly nothing: 4 H
    """
    heads, kv_heads, width = model.num_heads, model.num_kv_heads or model.num_heads, model.hidden_size
    head_dim = model.head_dim or width // heads
    ffn = model.ffn_hidden_size or 4 * width
    matrices = 3 if model.gated else 2
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    if model.moe.num_experts:
        used = model.moe.top_k + model.moe.num_shared_experts
        mlp = matrices * width * (model.moe.ffn_hidden_size or ffn) * used + width * model.moe.num_experts
    else:
        mlp = matrices * width * ffn
    layer = 2.0 * (attention + mlp) + 2.0 * model.seq_length * heads * head_dim
    return LayerCosts(
        layers=(layer,) * model.num_layers,
        embedding=4.0 * width,
        output=2.0 * width * model.vocab_size + 5.0 * model.vocab_size,
    )


def partition_layers(model: ModelConfig, stages: int) -> list[range]:
    """The layers of each stage of this model. Errors: as for `partition`."""
    return partition(layer_costs(model), stages)


def partition(costs: LayerCosts | Sequence[float], stages: int) -> list[range]:
    """The layers of each stage, cut so that the most expensive stage costs as little as possible.

    The embedding is counted on the first stage and the output on the last. Every stage has at least one layer. Among
    cuts with the same most expensive stage, the one that also keeps the sum of squares smallest is taken (then the one
    with larger stages first), so that equal layers divide evenly and every rank computes the same cut.

    Errors: ConfigError when there are fewer layers than stages.
    """
    if not isinstance(costs, LayerCosts):
        costs = LayerCosts(tuple(costs), 0.0, 0.0)
    count = len(costs.layers)
    if stages < 1 or stages > count:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ConfigError(
            f"{count} layers cannot be cut into {stages} pipeline stages (parallel.pipeline x "
            f"parallel.virtual_pipeline; two chunks a rank for zb-v and dualpipe-v): each needs at least one layer. "
            f"Use at most {count} stages; even cuts: {fitting}."
        )
    sums = [0.0]
    for cost in costs.layers:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, start: int, stop: int) -> float:
        return (
            sums[stop]
            - sums[start]
            + (costs.embedding if stage == 0 else 0.0)
            + (costs.output if stage == stages - 1 else 0.0)
        )

    # smallest possible maximum
    best = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    best[stages][count] = 0.0
    for stage in reversed(range(stages)):
        for start in range(stage, count - (stages - stage) + 1):
            best[stage][start] = min(
                max(cost_of(stage, start, stop), best[stage + 1][stop])
                for stop in range(start + 1, count - (stages - stage - 1) + 1)
            )
    limit = best[0][0] * (1 + 1e-12)
    # smallest sum of squares under that maximum
    squares = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    choice = [[0] * (count + 1) for _ in range(stages + 1)]
    squares[stages][count] = 0.0
    for stage in reversed(range(stages)):
        for start in range(stage, count - (stages - stage) + 1):
            for stop in reversed(range(start + 1, count - (stages - stage - 1) + 1)):
                cost = cost_of(stage, start, stop)
                total = cost * cost + squares[stage + 1][stop]
                if cost <= limit and total < squares[stage][start] * (1 - 1e-12):
                    squares[stage][start], choice[stage][start] = total, stop
    cuts = [0]
    for stage in range(stages):
        cuts.append(choice[stage][cuts[-1]])
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
