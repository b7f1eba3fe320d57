"""Layouts that work are resolved; those that do not are refused with numbers and alternatives."""

import re
import subprocess
import sys

import pytest

from megalm.config import ConfigError, ModelConfig, ParallelConfig
from megalm.config.layout import check_layout, deal


def model(**changes):
    shape = dict(num_layers=8, hidden_size=64, num_heads=8, num_kv_heads=4, vocab_size=100, seq_length=64) | changes
    config = ModelConfig(**shape)
    config.fill_in()
    return config


def test_data_is_what_is_left_of_the_world():
    resolved = check_layout(model(), ParallelConfig(tensor=2, pipeline=2, context=2), 16)
    assert (resolved.data, resolved.tensor, resolved.pipeline, resolved.context) == (2, 2, 2, 2)
    assert check_layout(model(), ParallelConfig(data=4, tensor=2), 8).data == 4


def test_v_shaped_and_interleaved_schedules_get_their_two_chunks():
    for schedule in ("zb-v", "dualpipe-v", "interleaved"):
        assert check_layout(model(), ParallelConfig(pipeline=2, schedule=schedule), 2).virtual_pipeline == 2
    assert check_layout(model(), ParallelConfig(pipeline=2), 2).virtual_pipeline == 1


@pytest.mark.parametrize(
    ("shape", "layout", "world", "named"),
    [
        ({}, dict(tensor=16), 16, "parallel.tensor=16 ranks are more than model.num_kv_heads=4 key/value heads"),
        ({}, dict(tensor=4), 6, "= 4 ranks, and the world has 6"),
        ({}, dict(data=4, tensor=4), 8, "= 16 ranks, and the world has 8"),
        (dict(num_heads=12, num_kv_heads=3), dict(tensor=4), 4, "they can share them only where 3 divides 4"),
        (dict(num_heads=6, num_kv_heads=2), dict(tensor=4), 4, "4 divides model.num_heads=6"),
        (dict(ffn_hidden_size=90), dict(tensor=4), 4, "does not divide model.ffn_hidden_size=90"),
        (dict(seq_length=62), dict(context=2), 2, "model.seq_length=62 divisible by 4"),
        (dict(seq_length=62), dict(tensor=4, sequence=True), 4, "divisible by context x tensor = 4"),
        (dict(num_layers=3), dict(pipeline=4), 4, "makes 4 stages, and model.num_layers=3"),
        ({}, dict(pipeline=2, virtual_pipeline=2), 2, "the schedule 1f1b runs one chunk"),
        ({}, dict(pipeline=2, virtual_pipeline=3, schedule="zb-v"), 2, "zb-v runs two chunks"),
        ({}, dict(expert=2), 4, "the model has no experts"),
        ({}, dict(zero_stage=3), 1, "parallel.zero_stage=3: 0 "),
        ({}, dict(tensor=0), 1, "parallel.tensor=0: must be at least 1"),
        ({}, dict(data="some"), 1, "parallel.data=some"),
    ],
)
def test_what_does_not_work_is_named(shape, layout, world, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        check_layout(model(**shape), ParallelConfig(**layout), world)


def test_heads_that_do_not_divide_are_dealt_out():
    assert check_layout(model(num_heads=9, num_kv_heads=3), ParallelConfig(tensor=2), 2).tensor == 2
    assert [deal(3, 2, rank) for rank in range(2)] == [(0, 2), (2, 1)]
    assert [deal(9, 4, rank) for rank in range(4)] == [(0, 3), (3, 2), (5, 2), (7, 2)]
    assert [deal(8, 4, rank) for rank in range(4)] == [(0, 2), (2, 2), (4, 2), (6, 2)]


def test_every_suggested_layout_works_and_the_nearest_comes_first():
    with pytest.raises(ConfigError) as refused:
        check_layout(model(num_heads=12, num_kv_heads=3), ParallelConfig(tensor=8, pipeline=2), 16)
    suggestions = re.findall(
        r"tensor=(\d+) parallel.pipeline=(\d+) parallel.context=(\d+) \(data (\d+)\)", str(refused.value)
    )
    assert suggestions[0] == ("2", "2", "1", "4") and len(suggestions) == 3
    for tensor, pipeline, context, data in suggestions:
        layout = ParallelConfig(tensor=int(tensor), pipeline=int(pipeline), context=int(context))
        assert check_layout(model(num_heads=12, num_kv_heads=3), layout, 16).data == int(data)


def test_a_world_of_thousands_is_checked_at_once():
    with pytest.raises(ConfigError, match="Layouts near it that work on 4096 ranks"):
        check_layout(model(num_layers=80, num_heads=64, num_kv_heads=8), ParallelConfig(tensor=48, pipeline=16), 4096)


def test_checking_needs_no_torch():
    code = "import sys, megalm.config.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
