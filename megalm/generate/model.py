"""A trained model in one process: from a run's folder, a checkpoint or another library's, ready to compute."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megalm.architecture.layers import is_of_prediction
from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.config.model import PredictionConfig
from megalm.convert.source import Source
from megalm.convert.weights import WeightReader
from megalm.data.batch import Batch
from megalm.model.transformer import Transformer
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import list_boxes
from megalm.precision.policy import PrecisionPolicy
from megalm.tokenizer.control_tokens import read_folder_settings, read_settings_beside
from megalm.tokenizer.tokenizer import Tokenizer, load_tokenizer


def build_model(
    config: ModelConfig,
    weights: WeightReader,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Build the whole model with the given global weights, in evaluation mode. Every weight must find its place, but for those of
    layers that predict further tokens, which only training has a use for."""
    context = LayerContext(Mesh.single(device), policy=PrecisionPolicy(dtype), device=device)
    model = Transformer(replace(config, prediction=PredictionConfig()), context)
    fill_weights(model, weights)
    return model.eval()


def fill_weights(model: Transformer, weights: WeightReader) -> None:
    """Overwrites the model's parameters with global weights, whatever part of each this rank's model holds.

    ConfigError where a weight is missing, has another shape, or (for a whole model) has no place in it.
    """
    boxes = list_boxes(model)
    left = set(weights.names()) - {box.name for box in boxes}
    if not model.config.prediction.depth:
        left = {name for name in left if not is_of_prediction(name, model.config.num_layers)}
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
def compute_logits(model: Transformer, tokens: Tensor) -> Tensor:
    """Compute logits fp32 at every position. Shapes: tokens [B, S] -> [B, S, V]"""
    batch = Batch(tokens=tokens, labels=tokens)
    return (
        model.head.logits(model.run_layers(model.embed(batch), batch))
        .transpose(0, 1)[..., : model.config.vocab_size]
        .float()
    )


def load_model(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    accept: Collection[str] = (),
) -> tuple[Source, Transformer]:
    """Load the model of any folder that `megalm.convert` reads, and where it came from."""
    from megalm.convert.formats import open_source

    source = open_source(path, accept=accept)
    if source.model.position_limit > source.model.seq_length:  # it sees as far as it is for, however it was trained
        source.model = replace(source.model, seq_length=source.model.position_limit)
    return source, build_model(source.model, source.weights, device=device, dtype=dtype)


def open_tokenizer(source: Source, given: Path | None = None) -> Tokenizer:
    """The tokenizer that came with the model, or the one that is given; ConfigError where there is none, or it is another's."""
    path = given or source.tokenizer
    if path is None:
        why = next(
            (note for note in source.notes if "tokenizer" in note),
            "no tokenizer beside the model; give its file with --tokenizer",
        )
        raise ConfigError(f"{source.path}: {why}")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > source.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} words, the model {source.model.vocab_size}: "
            "give the model's own with --tokenizer"
        )
    return tokenizer


def stop_tokens(source: Source, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens after which the model has nothing more to say.

    For a Hugging Face folder those that transformers stops at (generation_config.json's, else config.json's); a run stops at
    the end of the documents that it was trained on, too.
    """
    hugging_face = source.format == "huggingface"
    settings = read_folder_settings(Path(source.path)) if hugging_face else read_settings_beside(Path(tokenizer.path))
    ids = set(settings.numbers("eos_token_id"))
    if tokenizer.eos_id is not None and not (hugging_face and ids):
        ids.add(tokenizer.eos_id)
    return frozenset(ids)


def find_run_stops(tokenizer: Tokenizer) -> frozenset[int]:
    """Find the tokens at which a text of a model in training ends: what its tokenizer's folder says, and the end of documents."""
    ids = set(read_settings_beside(Path(tokenizer.path)).numbers("eos_token_id"))
    return frozenset(ids if tokenizer.eos_id is None else {*ids, tokenizer.eos_id})
