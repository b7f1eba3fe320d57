"""8-bit products on a GPU: the device's products beside what the 8-bit floats stand for, and a few steps of training."""

import pytest
import torch

from megalm import ops
from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.config.precision import RECIPES as WORDS
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import build_mesh
from megalm.precision.fp8 import Fp8Product
from megalm.precision.meter import Meter
from megalm.precision.policy import check_device
from megalm.precision.recipes import RECIPES
from megalm.train.parts import build_trainer
from tests.small_run import small_run
from tests.train.test_fp8_runs import QUIET

ACCUMULATION = 2**-9
"""Of the largest value of a product: Hopper's tensor cores keep about 14 bits of a sum (DeepSeek-V3, sec. 3.3.2)."""


def serves(recipe, device):
    try:
        check_device(recipe, device)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("size", [(256, 384, 512), (4096, 1536, 2048), (160, 208, 272)], ids=str)
@pytest.mark.parametrize("recipe", WORDS)
def test_the_devices_products_are_those_of_the_same_8_bit_floats(device, recipe, size):
    serves(recipe, device)
    tokens, features, hidden = size
    x, weight, grad = (
        torch.randn(shape, device=device).to(torch.bfloat16)
        for shape in ((tokens, hidden), (features, hidden), (tokens, features))
    )
    found = []
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            y, kept, has_x = Fp8Product(RECIPES[recipe], Meter("")).keeping().forward(x, weight, None, keep=True)
            backward = Fp8Product(RECIPES[recipe], Meter("")).backward(grad, kept)
            dx, dw = backward.compute_input_gradient(weight), torch.empty(features, hidden, device=device)
            backward.add_weight_gradient(dw, None if has_x else x, empty=True)
            found.append((y, dx, dw))
    for got, want in zip(*found, strict=True):
        largest = float(want.float().abs().max())
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=ACCUMULATION * largest)


def train(words, device, folder):
    """Losses of three steps."""
    config = compose_config(words)
    resolve(config, 1)
    trainer = build_trainer(config, build_mesh(config.parallel, device.type), folder)
    losses = [trainer.train_step()["loss"] for _ in range(3)]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return losses


@pytest.mark.parametrize("recipe", WORDS)
def test_a_run_on_the_device_follows_its_emulation(device, recipe, tmp_path):
    serves(recipe, device)
    losses = []
    for backend in ("auto", "reference"):
        words = small_run(
            tmp_path, *QUIET, "precision=fp8", f"precision.fp8.recipe={recipe}", "optim.lr=1e-3", f"device={device.type}",
            f"ops.backend={backend}", f"run.name={backend}",
        )  # fmt: skip
        with ops.use_backend(backend):
            losses.append(train(words, device, tmp_path))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
