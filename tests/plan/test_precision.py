"""The number format: what a file or a word gives is obeyed; where nobody gives one, the machine decides."""

import pytest

from megalm.config.compose import compose_config
from megalm.plan.machine import make_planned_machine, measure_this_machine, resolve_precision

GPU = make_planned_machine("h100", 8)


def dtype_on(machine, *words: str) -> str:
    config = compose_config(["+model=tiny", *words])
    resolve_precision(config, machine)
    return config.precision.dtype


@pytest.mark.parametrize("words", [[], ["precision=auto"], ["precision.dtype=auto"]], ids=" ".join)
def test_what_nobody_gave_follows_the_machine(words):
    assert dtype_on(GPU, *words) == "bf16"
    assert dtype_on(measure_this_machine(gpu=False), *words) == "fp32"


@pytest.mark.parametrize("words", [["precision=fp32"], ["precision.dtype=fp32"], ["+precision=fp32"]], ids=" ".join)
def test_what_was_given_is_obeyed_on_a_gpu(words):
    assert dtype_on(GPU, *words) == "fp32"


def test_an_experiment_gives_a_number_format(monkeypatch):
    from megalm.config import compose

    of_files = compose._of_files
    monkeypatch.setattr(
        compose, "_of_files", lambda words, folders: {**of_files(words, folders), "precision": {"dtype": "fp32"}}
    )
    assert dtype_on(GPU) == "fp32"
