"""A trained model in one process: from a run's folder, a checkpoint or another library's, ready to compute."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megalm.config import ModelConfig, ParallelConfig
from megalm.config.errors import ConfigError
from megalm.convert.source import Source
from megalm.convert.weights import WeightReader
from megalm.data.batch import Batch
from megalm.model.transformer import Transformer
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import boxes_of


def build_model(
    config: ModelConfig,
    weights: WeightReader,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The whole model with the given global weights, in evaluation mode. Every weight must find its place."""
    model = Transformer(config, Mesh.single(device), ParallelConfig(), device=device, dtype=dtype)
    fill(model, weights)
    return model.eval()


def fill(model: Transformer, weights: WeightReader) -> None:
    """Overwrites the model's parameters with global weights, whatever part of each this rank's model holds.

    ConfigError where a weight is missing, has another shape, or (for a whole model) has no place in it.
    """
    boxes = boxes_of(model)
    left = set(weights.names()) - {box.name for box in boxes}
    if left and model.first and model.last and len(model.layers) == model.config.num_layers:
        raise ConfigError(
            f"{len(left)} weights have no place in this model, the first is {min(left)}: is it another model's checkpoint?"
        )
    there = set(weights.names())
    for box in boxes:
        if box.name not in there:
            raise ConfigError(f"the weight {box.name} is missing: is it another model's checkpoint?")
        if weights.shape(box.name) != tuple(box.global_shape):
            raise ConfigError(
                f"the weight {box.name} is {weights.shape(box.name)}, this model needs {tuple(box.global_shape)}"
            )
        value = weights.read(box.name)
        for dim, (start, size) in enumerate(zip(box.offset, box.tensor.shape, strict=True)):
            value = value.narrow(dim, start, size)
        box.tensor.copy_(value)


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits fp32 at every position. Shapes: tokens [B, S] -> [B, S, V]"""
    batch = Batch(tokens=tokens, labels=tokens)
    return (
        model.logits(model.run_layers(model.embed(batch), batch))
        .transpose(0, 1)[..., : model.config.vocab_size]
        .float()
    )


def load_model(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Source, Transformer]:
    """The model of any folder that `megalm.convert` reads, and where it came from."""
    from megalm.convert.formats import open_source

    source = open_source(path)
    return source, build_model(source.model, source.weights, device=device, dtype=dtype)


def tokenizer_file(source: Source) -> Path:
    """The tokenizer that came with the model; ConfigError where there is none."""
    for wanted in ("tokenizer.json", "tokenizer.model", None):
        for file in source.files:
            if file.name == wanted or (
                wanted is None and file.name.endswith(("tokenizer.json", ".model", ".tiktoken"))
            ):
                return file
    raise ConfigError(f"{source.path}: no tokenizer beside the model; give its file with --tokenizer")
