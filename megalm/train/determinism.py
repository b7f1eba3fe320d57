"""What makes two runs the same: seeds of every generator, and algorithms that give the same bits."""

import os
import random

import numpy as np
import torch

from megalm.parallel.mesh import Mesh
from megalm.parallel.random import seed_ranks


def seed_everything(seed: int, mesh: Mesh) -> None:
    """Begin this rank's random numbers anew: Python's, numpy's and torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    seed_ranks(seed, mesh)


def choose_algorithms(determinism: str, device: torch.device) -> None:
    """Whether this process' algorithms give the same bits in every run (strict), or may not (fast).

    Strictly, on a GPU an operation that cannot is then an error: where torch may only warn, its attention computes gradients in
    an order that changes (so it warns in torch 2.11), and a replay of the guard's would find a machine to blame.
    """
    deterministic = determinism == "strict"
    if deterministic and device.type == "cuda":
        # cuBLAS asks for a workspace of its own for each stream, which it reads before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=device.type != "cuda")
    # A debugging aid that costs a write of every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
