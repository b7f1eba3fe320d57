"""The products of a mixture's experts in 8-bit floats: each expert as a linear layer of its own, on any ranks of experts."""

import pytest
import torch

from megalm.config import ConfigError
from megalm.config.precision import RECIPES as WORDS
from megalm.precision.fp8 import Fp8Product
from megalm.precision.meter import Meter
from megalm.precision.recipes import RECIPES
from tests.distributed import run_ranks
from tests.mixtures import mixture_run, train
from tests.precision.plain import products

COUNTS = torch.tensor([40, 0, 7, 33])
F_OUT, H = 96, 160


def example():
    generator = torch.Generator().manual_seed(9)
    x, grad = (torch.randn(88, n, generator=generator) for n in (H, F_OUT))  # 8 rows of no expert
    x[::5] *= 40
    grad[:, ::7] *= 100
    return x, grad, torch.randn(4, F_OUT, H, generator=generator)


@pytest.mark.parametrize("recipe", WORDS)
def test_each_expert_is_computed_as_a_linear_layer_of_its_own(recipe):
    x, grad, weight = example()
    product = Fp8Product(RECIPES[recipe], Meter("layers.0.mlp.experts.up")).for_experts()
    y, dx = product.multiply(x, weight, COUNTS), product.multiply_gradient(grad, weight, COUNTS)
    dw, twice = torch.full_like(weight, 7.0), torch.zeros_like(weight)
    product.add_weight_gradient(dw, grad, x, COUNTS, empty=True)
    for _ in range(2):
        product.add_weight_gradient(twice, grad, x, COUNTS, empty=False)
    torch.testing.assert_close(twice, 2 * dw)
    plain = "rowwise_wide" if recipe == "tensorwise" else recipe
    start = 0
    for expert, count in enumerate(COUNTS.tolist()):
        rows = slice(start, start + count)
        start += count
        if not count:
            assert not dw[expert].any()
            continue
        wanted = products(plain, x[rows], weight[expert], grad[rows])
        for got, want in zip((y[rows], dx[rows], dw[expert]), wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-6 * float(want.abs().max()))
    assert not y[start:].any() and not dx[start:].any()


def losses_of(world, words, folder):
    return [record["loss"] for record in run_ranks(world, train, world, words, folder)[0][0]]


def mixture(folder, *overrides):
    return mixture_run(
        folder, "mixtral", "precision=fp8", "precision.dtype=fp32", "optim.lr=1e-3", "model.init_std=0.04", *overrides
    )


LAYOUTS = {
    "experts over data": (2, "parallel.data=2", "parallel.expert=2"),
    "and ZeRO": (2, "parallel=zero2", "parallel.expert=2"),
    "by all-gather": (2, "parallel.data=2", "parallel.expert=2", "parallel.expert_dispatch=all_gather"),
    "over tensor ranks": (2, "parallel.tensor=2", "parallel.expert=2"),
    "fully_shard": (2, "parallel.data_mode=fully_shard"),
    "few rows at once": (1, "parallel.expert_rows=32"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_tensor_scales_experts_on_any_ranks_follow_one_ranks_losses(tmp_path, layout):
    world, *words = LAYOUTS[layout]
    alone = losses_of(1, mixture(tmp_path), tmp_path)
    wide = losses_of(1, mixture(tmp_path, "precision.fp8.skip=[*.experts.*]"), tmp_path)
    assert alone != wide
    assert losses_of(world, mixture(tmp_path, *words), tmp_path) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_with_blocks_along_tokens_they_are_close(tmp_path, recipe):
    recipe = f"precision.fp8.recipe={recipe}"
    alone = losses_of(1, mixture(tmp_path, recipe), tmp_path)
    assert losses_of(2, mixture(tmp_path, recipe, *LAYOUTS["experts over data"][1:]), tmp_path) == pytest.approx(
        alone, rel=5e-4
    )


def test_a_matrix_that_does_not_fit_is_refused():
    product = Fp8Product(RECIPES["mxfp8"], Meter("layers.0.mlp.experts.up")).for_experts()
    product.check(64, 32)
    with pytest.raises(ConfigError, match=r"layers.0.mlp.experts.up: .* 48 x 32, .* multiples of 32"):
        product.check(48, 32)
