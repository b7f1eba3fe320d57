"""Exact parameters of a model."""

from collections import Counter
from math import prod

from megalm.architecture.layers import LayerSpec, list_trained_layers
from megalm.architecture.shape import resolve_shape
from megalm.architecture.tensors import count_parameters, list_back_tensors, list_front_tensors
from megalm.config import ModelConfig
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.page.plots import Bars
from megalm.plan.models import list_models
from megalm.plan.report import Report
from megalm.plan.request import Request, compose

HELP = "exact parameters of a model, tensor by tensor"
KEYS = ["seq_length"]
EXAMPLE = "megalm plan shape +model=7b"


def answer(request: Request) -> Report:
    """Parameters by tensor; without a model, the list of models."""
    if not request.has_model and not request.overrides:
        return _list()
    model = compose(request).model
    counts = count_parameters(model)
    shape = resolve_shape(model)
    front, back = list(list_front_tensors(shape)), list(list_back_tensors(shape))
    rows = [(name, _shape(shape), 1, f"{prod(shape):,}") for name, shape in front]
    for layer, times in _kinds(model):
        merged = _merged(list(layer.list_tensors("layers.N.")))
        rows += [(name, _shape(shape), times, f"{prod(shape) * times:,}") for name, shape in merged]
    rows += [(name, _shape(shape), 1, f"{prod(shape):,}") for name, shape in back]
    data = {
        "model": model.name,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "embedding_parameters": counts.embedding,
        "non_embedding_parameters": counts.non_embedding,
        "parameters_per_layer": counts.layer,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "seq_length": model.seq_length,
        "tensors": len(counts.tensors),
        "bytes_bf16": 2 * counts.total,
        "bytes_checkpoint": 12 * counts.total,
    }
    if model.moe.num_experts:
        data.update(num_experts=model.moe.num_experts, top_k=model.moe.top_k)
    if model.prediction.depth:
        data.update(prediction_depth=model.prediction.depth, prediction_parameters=counts.prediction)
    summary = [
        ("parameters", f"{counts.total:,}", format_count(counts.total, 4)),
        ("active for one token", f"{counts.active:,}", format_count(counts.active, 4)),
        ("in embeddings", f"{counts.embedding:,}", format_count(counts.embedding, 4)),
        ("in one layer", f"{counts.layer:,}", format_count(counts.layer, 4)),
    ]
    if model.prediction.depth:
        summary.append(("predict further tokens", f"{counts.prediction:,}", format_count(counts.prediction, 4)))
    return Report(
        f"{model.name}: parameters",
        data,
        [
            Table(f"{model.name}: {model.num_layers} layers", ("tensor", "shape", "times", "parameters"), rows),
            Table("in all", ("", "parameters", "about"), summary),
            Bars("parameters by part", "parameters", [(model.name, _parts(model))]),
        ],
    )


def _merged(layer: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """Experts written once, with their number in the shape."""
    merged: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, shape in layer:
        words = name.split(".")
        key = ".".join("E" if word.isdigit() else word for word in words)
        merged[key] = (merged.get(key, (0, shape))[0] + 1, shape)
    return [(name, shape if count == 1 else (count, *shape)) for name, (count, shape) in merged.items()]


def _kinds(model: ModelConfig) -> list[tuple[LayerSpec, int]]:
    """Each kind of layer, and how many there are."""
    return list(Counter(list_trained_layers(model)).items())


def _parts(model: ModelConfig) -> list[tuple[str, float]]:
    counts = count_parameters(model)
    sums = dict.fromkeys(("attention", "MLP", "norms", *(["prediction"] if model.prediction.depth else [])), 0.0)
    for layer, times in _kinds(model):
        for name, shape in layer.list_tensors():
            part = "norms" if "norm" in name else "attention" if name.startswith("attention") else "MLP"
            part = "prediction" if name.startswith("merge") else part
            sums[part] += prod(shape) * times
    return [("embeddings", float(counts.embedding)), *sums.items()]


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size}" for size in shape)


def _list() -> Report:
    rows, data = [], []
    for name, model in list_models().items():
        counts = count_parameters(model)
        rows.append(
            (
                name,
                f"{counts.total:,}",
                model.num_layers,
                model.hidden_size,
                model.num_heads,
                model.num_kv_heads,
                model.seq_length,
            )
        )
        data.append({"model": name, "parameters": counts.total, "active_parameters": counts.active})
    headers = ("model", "parameters", "layers", "width", "heads", "key/value heads", "sequence (tokens)")
    return Report("models", {"models": data}, [Table("models of conf/model", headers, rows)])
