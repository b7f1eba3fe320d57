"""Which product of which layer of a run computes in what, and how far it is from a wide one, on one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalm.architecture.products import list_products
from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.reader import CheckpointReader
from megalm.config import Config, ParallelConfig
from megalm.config.attempts import CONFIG
from megalm.config.saved import load_config
from megalm.data.loader import Loader
from megalm.objectives.registry import build_objective
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import list_boxes
from megalm.precision.compare import Errors, compare_products
from megalm.precision.fp8 import find_meters
from megalm.precision.meter import Meters
from megalm.train.build import build_chunks


def look_at_precision(run: Path) -> dict[str, Any]:
    """Find what each product of a run computes in: {"run", "step" of the weights, "recipe", "dtype", "products": rows}.

    One process computes one micro-batch of the data that the run would see next, with the newest checkpoint's weights (initial
    ones where there is none). A row has the product's name, rows and columns of its weight, `runs_in`, and, of 8-bit products,
    the relative errors of y, dx and dW against products in precision.dtype, and that of y's worst row.

    Errors: ConfigError if there is no such run, or its data is gone.
    """
    config = load_config(run / CONFIG)
    config.parallel = ParallelConfig(recompute="none")
    config.data.prefetch = 0
    config.train.global_batch_size = config.train.micro_batch_size
    chunks = build_chunks(config, Mesh.single(), build_objective(config))
    step, widened = _load_weights(config, run, chunks[0])
    Meters([], find_meters(chunks)).widen(widened)
    errors = {each.name: each for each in compare_products(chunks)}
    loader = Loader(config, Mesh.single().data)
    try:
        batch = next(iter(loader.next()))
    finally:
        loader.close()
    total, _ = chunks[0](None, batch)
    total.backward()
    rows = [
        {
            "product": product.name,
            "rows": product.rows,
            "columns": product.columns,
            **_describe(config, errors.get(product.name)),
        }
        for _, product in list_products(config.model)
    ]
    recipe, dtype = config.precision.fp8.recipe, config.precision.dtype
    return {"run": str(run), "step": step, "recipe": recipe, "dtype": dtype, "products": rows}


def _describe(config: Config, errors: Errors | None) -> dict[str, Any]:
    if errors is None or errors.wide:
        return {"runs_in": config.precision.dtype, "errors": {}}
    return {"runs_in": config.precision.fp8.recipe, "errors": errors.found}


def _load_weights(config: Config, run: Path, chunk: Any) -> tuple[int, list[str]]:
    """Fill the model from the newest checkpoint; its step, and the products that the guard has widened."""
    try:
        reader = CheckpointReader(config.checkpoint.path or run)
    except CheckpointError:
        return 0, []
    boxes = {box.name: box for box in list_boxes(chunk)}
    for name, value in reader.tensors():
        if name in boxes:
            boxes[name].tensor.copy_(value)
    state = reader.state()
    guard = state.get("hooks", {}).get("guard", {})
    return int(state["step"]), list(guard.get("policy", {}).get("widened", ()))
