"""Cuts the model into pipeline stages by what they cost, not by how many layers they have. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalm.architecture.kept import cache_by_model
from megalm.architecture.layers import LayerSpec, specify_layers, specify_predictions
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


@cache_by_model
def count_layer_costs(model: ModelConfig) -> LayerCosts:
    """Count what each part of the model costs, per token of a sequence of model.seq_length.

    layer:      what its blocks cost (matrix products, and for attention the visible part of scores and weighted sums)
    output:     2 * H * V, plus 5 V for the cross-entropy's exponentials and sums; for each layer that predicts a further
                token the same again, and the layer
    embedding:  a table look-up and its gradient's scatter move H elements and compute nearly nothing: 4 H
    """
    width = model.hidden_size
    layers = specify_layers(model)
    head = 2.0 * width * model.vocab_size + 5.0 * model.vocab_size
    costs = {layer: _count_layer_cost(layer, model.seq_length) for layer in set(layers)}
    return LayerCosts(
        layers=tuple(costs[layer] for layer in layers),
        embedding=4.0 * width,
        output=head + sum(_count_layer_cost(layer, model.seq_length) + head for layer in specify_predictions(model)),
    )


def _count_layer_cost(layer: LayerSpec, length: int) -> float:
    return sum(block.matrix_flops + block.count_core_flops(length, causal=True) for block in layer.blocks)


def partition_layers(model: ModelConfig, stages: int) -> list[range]:
    """The layers of each stage of this model. Errors: as for `partition`."""
    return partition(count_layer_costs(model), stages)


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
