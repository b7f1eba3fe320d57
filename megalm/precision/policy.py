"""Which number format each tensor of a run has, and which product each weight takes part in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalm.architecture.products import choose_fp8_products
from megalm.config.errors import ConfigError
from megalm.config.model import ModelConfig
from megalm.config.precision import PrecisionConfig
from megalm.ops.backend import get_backend
from megalm.precision.fp8 import Fp8Product
from megalm.precision.meter import Meter
from megalm.precision.product import PLAIN, Product
from megalm.precision.recipes import RECIPES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PrecisionPolicy:
    """The formats of a run."""

    weights: torch.dtype = torch.float32
    """Of weights, activations and messages between stages."""
    recipe: str = "none"
    """How products in 8-bit floats are computed; one of `megalm.precision.recipes.RECIPES`."""
    fp8: frozenset[str] = frozenset()
    """Names of the products that are."""

    def choose_product(self, name: str) -> Product:
        """Choose the product that a weight takes part in, by its global name; of several stacked ones, by that of the stack."""
        return Fp8Product(RECIPES[self.recipe], Meter(name)) if name in self.fp8 else PLAIN


def make_policy(config: PrecisionConfig, model: ModelConfig) -> PrecisionPolicy:
    """Make the policy that a resolved configuration asks for."""
    return PrecisionPolicy(DTYPES[config.dtype], config.fp8.recipe, choose_fp8_products(model, config.fp8))


_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_wide": (9, 0), "blockwise": (9, 0)}
"""The first GPUs that torch has a product for, by recipe: Ada and Hopper."""


def check_device(recipe: str, device: torch.device) -> None:
    """ConfigError where the recipe is to be computed on a GPU that has no product for it."""
    if recipe == "none" or device.type != "cuda" or get_backend() == "reference":
        return
    needed, found = _CAPABILITY.get(recipe), torch.cuda.get_device_capability(device)
    if needed is not None and found >= needed:
        return
    served = [name for name, least in _CAPABILITY.items() if found >= least]
    why = (
        "there is no product for it on GPUs yet"
        if needed is None
        else f"it needs compute capability {needed[0]}.{needed[1]} or above"
    )
    raise ConfigError(
        f"precision.fp8.recipe={recipe} on {torch.cuda.get_device_name(device)} (compute capability {found[0]}.{found[1]}): "
        f"{why}. Here it can be {', '.join(served) or 'none'}; or emulate it by ops.backend=reference."
    )
