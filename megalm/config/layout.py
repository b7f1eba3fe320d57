"""Which layouts a model and a world allow: checked before anything is built. No torch."""

from __future__ import annotations

import math
from dataclasses import replace

from megalm.config.errors import ConfigError
from megalm.config.mixture import name_near_divisors
from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig

_V_SHAPED = ("zb-v", "dualpipe-v")
_SUGGESTIONS = 3


def check_layout(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> ParallelConfig:
    """The layout with every choice made: `data` a number, `virtual_pipeline` what the schedule needs.

    Errors: ConfigError that names the numbers that do not go together, and the nearest layouts that do.
    """
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor"):
        value = getattr(parallel, name)
        if value < 1:
            raise ConfigError(f"parallel.{name}={value}: must be at least 1.")
    if parallel.data != "auto" and (not isinstance(parallel.data, int) or parallel.data < 1):
        raise ConfigError(f"parallel.data={parallel.data}: a positive number, or auto (what is left of the world).")
    if parallel.zero_stage not in (0, 1, 2):
        raise ConfigError(
            f"parallel.zero_stage={parallel.zero_stage}: 0 (everything on every data rank), 1 (optimizer state split) "
            "or 2 (gradients too)."
        )
    if parallel.bucket_mb <= 0:
        raise ConfigError(f"parallel.bucket_mb={parallel.bucket_mb}: must be positive.")
    resolved = _resolve(parallel, world_size)
    problem = _problem(model, resolved, world_size)
    if problem is None:
        return resolved
    near = _nearest(model, resolved, world_size)
    rank_word = "rank" if world_size == 1 else "ranks"
    if not near:
        advice = f"No layout of this model works on {world_size} {rank_word}: choose another world_size or model."
    else:
        advice = f"Layouts near it that work on {world_size} {rank_word}: {'; '.join(map(_describe, near))}."
    raise ConfigError(f"{problem} {advice}")


def _resolve(parallel: ParallelConfig, world_size: int) -> ParallelConfig:
    """Fill in `data: auto` (rounded down; at least 1) and the two chunks that V-shaped and interleaved schedules have."""
    data = parallel.data
    if data == "auto":
        data = max(1, world_size // (parallel.tensor * parallel.context * parallel.pipeline))
    chunks = parallel.virtual_pipeline
    if chunks == 1 and (
        parallel.schedule in _V_SHAPED or (parallel.schedule == "interleaved" and parallel.pipeline > 1)
    ):
        chunks = 2
    return replace(parallel, data=data, virtual_pipeline=chunks)


def _problem(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> str | None:
    """The first reason why a resolved layout cannot work; None if it can."""
    tensor, context, pipeline, data = parallel.tensor, parallel.context, parallel.pipeline, parallel.data
    assert isinstance(data, int)
    product = data * tensor * pipeline * context
    if product != world_size:
        return (
            f"parallel.data={data} x tensor={tensor} x pipeline={pipeline} x context={context} = {product} ranks, "
            f"and the world has {world_size}."
        )
    return (
        _tensor_problem(model, tensor)
        or _expert_problem(model, parallel)
        or _sequence_problem(model, parallel)
        or _pipeline_problem(model, parallel)
    )


def _expert_problem(model: ModelConfig, parallel: ParallelConfig) -> str | None:
    """Experts are dealt over the ranks of a stage, and each one's hidden features over expert_tensor of them."""
    expert, parts, moe = parallel.expert, parallel.expert_tensor, model.moe
    asked = f"parallel.expert={expert}" if parts == 1 else f"parallel.expert={expert} x expert_tensor={parts}"
    if not moe.num_experts:
        return f"{asked}, and the model has no experts (model.moe.num_experts=0)." if expert * parts > 1 else None
    assert isinstance(parallel.data, int)
    ranks = parallel.data * parallel.context * parallel.tensor
    if ranks % (expert * parts):
        return f"{asked} does not divide the {ranks} ranks of data x context x tensor, over which experts are spread."
    if moe.num_experts % expert:
        return (
            f"parallel.expert={expert} does not divide model.moe.num_experts={moe.num_experts}: "
            f"{name_near_divisors(moe.num_experts, expert)} would."
        )
    width = moe.ffn_hidden_size or model.ffn_hidden_size
    if width and width % parts:
        return (
            f"parallel.expert_tensor={parts} does not divide an expert's hidden size, {width}: "
            f"{name_near_divisors(width, parts)} would."
        )
    return None


def deal(units: int, size: int, rank: int) -> tuple[int, int]:
    """(first, count) of the units that a rank gets when they are dealt as evenly as they can be, the first ranks more."""
    each, more = divmod(units, size)
    return rank * each + min(rank, more), each + (rank < more)


def _tensor_problem(model: ModelConfig, tensor: int) -> str | None:
    """Key/value heads with their query heads are dealt over the ranks; where there are fewer, ranks share one."""
    kv_heads = model.num_kv_heads or model.num_heads
    if kv_heads < tensor and (tensor % kv_heads or model.num_heads % tensor):
        return (
            f"parallel.tensor={tensor} ranks are more than model.num_kv_heads={kv_heads} key/value heads: they can share "
            f"them only where {kv_heads} divides {tensor} and {tensor} divides model.num_heads={model.num_heads}."
        )
    dense = any(model.moe.is_dense(layer) for layer in range(model.num_layers))
    shared = model.moe.shared_ffn_hidden_size if model.moe.num_experts else None
    if dense and model.ffn_hidden_size and model.ffn_hidden_size % tensor:
        return f"parallel.tensor={tensor} does not divide model.ffn_hidden_size={model.ffn_hidden_size}."
    if shared and shared % tensor:
        return f"parallel.tensor={tensor} does not divide the shared experts' hidden size, {shared}."
    return None


def _sequence_problem(model: ModelConfig, parallel: ParallelConfig) -> str | None:
    tensor, context = parallel.tensor, parallel.context
    if context > 1 and model.seq_length % (2 * context):
        return (
            f"parallel.context={context} needs model.seq_length={model.seq_length} divisible by {2 * context}: "
            "each rank holds two blocks of the sequence, an early one and a late one."
        )
    if parallel.sequence and model.seq_length % (context * tensor):
        return (
            f"parallel.sequence=true needs model.seq_length={model.seq_length} divisible by context x tensor = "
            f"{context * tensor}."
        )
    return None


def _pipeline_problem(model: ModelConfig, parallel: ParallelConfig) -> str | None:
    pipeline, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks > 1 and parallel.schedule in ("1f1b", "gpipe", "zb-h1"):
        return (
            f"parallel.virtual_pipeline={chunks}: the schedule {parallel.schedule} runs one chunk on each rank; "
            "interleaved runs several, zb-v and dualpipe-v two."
        )
    if parallel.schedule in _V_SHAPED and chunks != 2:
        return f"parallel.virtual_pipeline={chunks}: the schedule {parallel.schedule} runs two chunks on each rank."
    stages = pipeline * chunks
    if model.num_layers < stages:
        times = f" x virtual_pipeline={chunks}" if chunks > 1 else ""
        return (
            f"parallel.pipeline={pipeline}{times} makes {stages} stages, and model.num_layers={model.num_layers} "
            "does not give each one a layer."
        )
    return None


def _nearest(model: ModelConfig, wanted: ParallelConfig, world_size: int) -> list[ParallelConfig]:
    """Up to three layouts that work, the least changed first (distance: sum of log-ratios of the axes' sizes)."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    chunks = {wanted.virtual_pipeline, 2 if wanted.schedule in _V_SHAPED else 1}
    found: list[tuple[float, int, ParallelConfig]] = []
    for tensor in divisors:
        for context in divisors:
            for pipeline in divisors:
                data, rest = divmod(world_size, tensor * context * pipeline)
                if rest or not data:
                    continue
                experts, parts = _near_experts(model, wanted, data * context * tensor)
                for count in chunks:
                    schedule = wanted.schedule
                    if count > 1 and schedule in ("1f1b", "gpipe", "zb-h1"):
                        continue
                    changed = replace(
                        wanted,
                        data=data,
                        tensor=tensor,
                        context=context,
                        pipeline=pipeline,
                        virtual_pipeline=count,
                        expert=experts,
                        expert_tensor=parts,
                    )
                    if _problem(model, changed, world_size) is None:
                        found.append((_distance(wanted, changed), len(found), changed))
    return [layout for _, _, layout in sorted(found)[:_SUGGESTIONS]]


def _near_experts(model: ModelConfig, wanted: ParallelConfig, ranks: int) -> tuple[int, int]:
    """(expert, expert_tensor), as near to the wanted ones as the model and a stage's ranks allow."""
    count = model.moe.num_experts
    if not count:
        return 1, 1
    width = model.moe.ffn_hidden_size or model.ffn_hidden_size or wanted.expert_tensor
    parts = max(n for n in range(1, wanted.expert_tensor + 1) if ranks % n == 0 and width % n == 0)
    fitting = [n for n in range(1, count + 1) if count % n == 0 and ranks % (n * parts) == 0]
    return min(fitting, key=lambda n: abs(math.log2(n / wanted.expert))), parts


def _distance(a: ParallelConfig, b: ParallelConfig) -> float:
    # The data axis is what is left over: changing it is no choice that was made, so it counts little.
    weights = {"tensor": 1.0, "context": 1.0, "pipeline": 1.0, "virtual_pipeline": 0.5, "data": 0.25}
    weights |= {"expert": 1.0, "expert_tensor": 1.0}
    return sum(weight * abs(math.log2(getattr(a, name) / getattr(b, name))) for name, weight in weights.items())


def _describe(parallel: ParallelConfig) -> str:
    parts = [f"parallel.{name}={getattr(parallel, name)}" for name in ("tensor", "pipeline", "context")]
    if parallel.virtual_pipeline > 1:
        parts.append(f"parallel.virtual_pipeline={parallel.virtual_pipeline}")
    parts += [f"parallel.{name}={n}" for name in ("expert", "expert_tensor") if (n := getattr(parallel, name)) > 1]
    return " ".join([*parts, f"(data {parallel.data})"])
