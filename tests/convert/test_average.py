"""The mean of several checkpoints' weights, and what cannot be averaged."""

from dataclasses import replace

import pytest
import torch

from megalm.config import ConfigError
from megalm.convert.average import average
from megalm.convert.weights import MemoryWeights
from tests.assembled.runs import start, train
from tests.convert.test_upcycle import source


def varied(seed, dtype=torch.float32):
    made = source()
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(made.weights.shape(n), generator=generator).to(dtype) for n in made.weights.names()}
    return replace(made, path=f"model-{seed}", weights=MemoryWeights(weights), step=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_the_mean_rounded_once(dtype):
    each = [varied(seed, dtype) for seed in (1, 2, 3)]
    mean = average(each)
    for name in mean.weights.names():
        wanted = torch.stack([one.weights.read(name).double() for one in each]).mean(0).to(dtype)
        assert torch.equal(mean.weights.read(name), wanted)
    assert mean.step == 3 and "the mean of 3 models: model-1 (step 1)" in mean.notes[-1]


def test_another_function_or_shape_is_refused_by_name():
    first, other = varied(1), varied(2)
    with pytest.raises(ConfigError, match="model-2: rope_theta is"):
        average([first, replace(other, model=replace(other.model, rope_theta=5e5))])
    short = {name: other.weights.read(name) for name in other.weights.names()}
    name = next(iter(short))
    short[name] = short[name][:-1]
    with pytest.raises(ConfigError, match=f"model-2: {name} has the shape"):
        average([first, replace(other, weights=MemoryWeights(short))])


def test_two_checkpoints_of_a_run_are_averaged_as_a_user_does(tmp_path):
    run = train(tmp_path).ended_well()
    steps = sorted(run.folder.glob("checkpoints/step-*[0-9]"))
    words = [str(steps[0]), str(tmp_path / "mean"), "--average", str(steps[1]), "--to", "megalm"]
    status, shown, errors = start("tools.convert", *words)
    assert status == 0, errors
    assert "the mean of 2 models" in shown
    status, _, errors = start("tools.convert", *words[:1], str(tmp_path / "x"), *words[2:], "--optimizer")
    assert status == 2 and "a mean has no moments" in errors
