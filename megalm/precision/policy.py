"""Which number format each tensor of a run has, and which product each weight takes part in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalm.config.precision import PrecisionConfig
from megalm.precision.product import PLAIN, Product

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PrecisionPolicy:
    """The formats of a run."""

    weights: torch.dtype = torch.float32
    """Of weights, activations and messages between stages."""
    product: Product = PLAIN
    """How the layers' products with weight matrices are computed."""

    def choose_product(self, name: str) -> Product:
        """The product that a weight takes part in, by its global name: plain outside the layers (embedding, output matrix)."""
        return self.product if name.startswith("layers.") else PLAIN


def make_policy(config: PrecisionConfig) -> PrecisionPolicy:
    """The policy that a resolved configuration asks for."""
    return PrecisionPolicy(DTYPES[config.dtype])
