"""The course of the learning rate over a run."""

import pytest

from megalm.config import OptimConfig
from megalm.config.compose import compose_config
from megalm.launch.resolve import resolve
from megalm.optim.lr import compute_learning_rate, count_warmup_steps


def course(total: int, **values) -> list[float]:
    return [compute_learning_rate(OptimConfig(lr=1.0, min_lr=0.1, **values), step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [None, 0, 1, 7, 98, 99, 100, 500])
@pytest.mark.parametrize("total", [3, 8, 100, 101, 110, 400])
@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_every_course_reaches_its_peak_and_its_end(schedule, warmup, total, fraction):
    rates = course(total, schedule=schedule, warmup_steps=warmup, decay_fraction=fraction)
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates == [*sorted(rates[: peak + 1]), *sorted(rates[peak + 1 :], reverse=True)]


def test_a_decay_that_would_begin_within_the_warm_up_begins_at_its_peak():
    rates = course(110, schedule="wsd", warmup_steps=100)
    assert rates[100] == 1.0 and rates[99] == pytest.approx(100 / 101)
    falls = [before - after for before, after in zip(rates[100:], rates[101:], strict=False)]
    assert falls == pytest.approx([0.1] * 9)


def test_a_decay_of_the_whole_run_begins_at_the_peak():
    rates = course(10, schedule="wsd", warmup_steps=0, decay_fraction=1.0)
    assert rates == pytest.approx([1 - 0.1 * step for step in range(10)])


@pytest.mark.parametrize(
    ("given", "total", "schedule", "expected"),
    [
        (None, 1000, "cosine", 100),
        (None, 102, "cosine", 100),
        (None, 101, "cosine", 10),
        (None, 110, "wsd", 11),
        (None, 8, "cosine", 1),
        (None, 100, "constant", 10),
        (100, 110, "wsd", 100),
        (100, 8, "cosine", 1),
        (9, 10, "cosine", 1),
        (8, 10, "cosine", 8),
        (9, 10, "constant", 9),
        (5, 1, "cosine", 0),
        (5, 2, "cosine", 0),
    ],
)
def test_a_warm_up_that_does_not_fit_is_a_tenth_of_the_run(given, total, schedule, expected):
    assert count_warmup_steps(OptimConfig(warmup_steps=given, schedule=schedule), total) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.steps=8"], ["Warm-up: 1 step, because the usual 100 steps do not fit into a run of 8."]),
        (
            ["train.steps=30", "optim.warmup_steps=30"],
            ["Warm-up: 3 steps, because optim.warmup_steps=30 does not fit into a run of 30."],
        ),
        (["train.steps=300"], []),
        (["train.steps=30", "optim.warmup_steps=5"], []),
    ],
)
def test_another_warm_up_than_asked_for_is_told(words, told):
    config = compose_config(["+model=tiny", *words])
    assert resolve(config, 1) == told
    assert config.optim.warmup_steps is not None


@pytest.mark.parametrize("ranks", [1, 3, 16, 32])
def test_a_micro_batch_that_nobody_gave_fits_the_data_ranks(ranks):
    config = compose_config(["+model=tiny"])
    resolve(config, ranks)
    assert config.train.global_batch_size == 32 and 32 // config.train.micro_batch_size >= ranks
