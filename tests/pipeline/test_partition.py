"""Cutting stages by cost."""

import itertools
import random

import pytest

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.pipeline.partition import LayerCosts, count_layer_costs, partition


def stage_costs(costs: LayerCosts, cut: list[range]) -> list[float]:
    sums = [sum(costs.layers[i] for i in layers) for layers in cut]
    sums[0] += costs.embedding
    sums[-1] += costs.output
    return sums


def test_equal_layers_divide_evenly_and_a_remainder_goes_first():
    assert partition([1.0] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert [len(r) for r in partition([1.0] * 10, 4)] == [3, 3, 2, 2]
    assert partition([1.0] * 3, 1) == [range(0, 3)]
    # floating-point sums of equal costs must not move a cut
    assert [len(r) for r in partition([0.1] * 80, 16)] == [5] * 16


def test_every_cut_is_the_best_one():
    numbers = random.Random(0)
    for _ in range(60):
        count = numbers.randint(1, 8)
        stages = numbers.randint(1, count)
        costs = LayerCosts(
            tuple(numbers.choice((1.0, 1.0, 2.0, 5.0)) for _ in range(count)),
            numbers.choice((0.0, 0.5, 3.0)),
            numbers.choice((0.0, 2.0, 4.0)),
        )
        cut = partition(costs, stages)
        assert [i for layers in cut for i in layers] == list(range(count)) and len(cut) == stages
        every = []
        for inner in itertools.combinations(range(1, count), stages - 1):
            cuts = (0, *inner, count)
            every.append([range(a, b) for a, b in itertools.pairwise(cuts)])
        lowest = min(max(stage_costs(costs, c)) for c in every)
        assert max(stage_costs(costs, cut)) == pytest.approx(lowest)
        square = min(
            sum(x * x for x in stage_costs(costs, c)) for c in every if max(stage_costs(costs, c)) <= lowest + 1e-9
        )
        assert sum(x * x for x in stage_costs(costs, cut)) == pytest.approx(square)


def model(**fields) -> ModelConfig:
    made = ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, vocab_size=32000, seq_length=2048)
    for name, value in fields.items():
        setattr(made, name, value)
    made.fill_in()
    return made


def test_a_large_vocabulary_takes_layers_from_the_last_stage():
    small, large = model(), model(vocab_size=256_000)
    assert [len(r) for r in partition(count_layer_costs(small), 4)] == [8, 8, 8, 8]
    sizes = [len(r) for r in partition(count_layer_costs(large), 4)]
    # 2 H V = 2.1 GFLOP a token is 4.6 layers of 0.45 GFLOP
    assert sizes[-1] == 5 and sum(sizes) == 32


def test_layer_costs_by_hand():
    costs = count_layer_costs(model(num_kv_heads=8, ffn_hidden_size=14336))
    attention = 4096 * 4096 * 2 + 4096 * 1024 * 2
    assert costs.layers[0] == 2 * (attention + 3 * 4096 * 14336) + 2 * 2048 * 4096
    assert len(costs.layers) == 32
    assert costs.output == (2 * 4096 + 5) * 32000
    assert costs.embedding < costs.layers[0] / 1000


def test_more_stages_than_layers_is_refused_with_what_fits():
    with pytest.raises(ConfigError, match="6 layers cannot be cut into 8 .* even cuts: 1, 2, 3, 6"):
        partition([1.0] * 6, 8)
