"""What a run on this rank is made of: each part built once, and handed to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.architecture.products import choose_fp8_products
from megalm.checkpoint.checkpointer import Checkpointer
from megalm.config import Config
from megalm.data.loader import Loader
from megalm.journal import EventLog
from megalm.objectives.objective import Objective
from megalm.objectives.registry import build_objective
from megalm.optim import build_optimizer
from megalm.optim.logit_clip import LogitClip
from megalm.parallel.mesh import Mesh
from megalm.pipeline.execute import Executor
from megalm.precision.fp8 import find_kept_weights, find_meters
from megalm.precision.meter import Meters
from megalm.precision.policy import make_policy
from megalm.train.balance import Balance
from megalm.train.batch_source import BatchSource, Engine
from megalm.train.build import build_chunks, choose_schedule, find_local_seq_length
from megalm.train.determinism import choose_algorithms, seed_everything
from megalm.train.hooks import Hook
from megalm.train.mean_loss import Evaluator
from megalm.train.measure import Measurement
from megalm.train.pulse import Pulse
from megalm.train.trainer import Trainer

if TYPE_CHECKING:
    from megalm.model.transformer import Transformer
    from megalm.optim.fully_sharded import FullyShardedOptimizer
    from megalm.optim.sharded import ShardedOptimizer


@dataclass(frozen=True)
class Parts:
    """The parts of one run on one rank; the trainer puts none of its own beside them."""

    config: Config
    mesh: Mesh
    folder: Path
    """The run's folder."""
    events: EventLog
    objective: Objective
    """What is minimised."""
    model_chunks: Sequence[Transformer]
    optimizer: ShardedOptimizer | FullyShardedOptimizer
    executor: Executor
    batch_source: BatchSource
    measurement: Measurement
    evaluator: Evaluator
    logit_clip: LogitClip
    balance: Balance
    meters: Meters
    """Of the products in 8-bit floats."""
    checkpoints: Checkpointer


def build_parts(
    config: Config,
    mesh: Mesh,
    folder: Path,
    *,
    objective: Objective | None = None,
    batch_source: BatchSource | None = None,
) -> Parts:
    """Build the parts of a resolved configuration on this rank, with initial weights; process-wide seeds are set.

    objective, batch_source: what to minimise and where batches come from; None: what is configured, and the loader.
    """
    events = EventLog(folder / "events.jsonl", writes=mesh.rank == 0)
    seed_everything(config.train.seed, mesh)
    choose_algorithms(config.train.determinism, mesh.device)
    objective = objective or build_objective(config)
    chunks = build_chunks(config, mesh, objective)
    optimizer = build_optimizer(chunks, config.optim, mesh, config.parallel)
    length = find_local_seq_length(config, mesh)
    keeps = config.precision.fp8.keep_weights and config.parallel.data_mode != "fully_shard"
    executor = Executor(
        chunks,
        choose_schedule(config, mesh.data.size),
        mesh.pipeline,
        micro_batch_size=config.train.micro_batch_size,
        seq_length=length,
        hidden_size=config.model.hidden_size,
        dtype=make_policy(config.precision, config.model).weights,
        device=mesh.device,
        kept_weights=find_kept_weights(chunks) if keeps else (),
        split_backward=config.parallel.data_mode != "fully_shard",  # weights are whole only during backward
    )
    batch_source = batch_source or Loader(config, mesh.data)
    batch_source.bind(Engine(chunks, executor, optimizer))
    measurement = Measurement(config, mesh, chunks, optimizer, objective, batch_source.source_names)
    clipped = optimizer.boxes() if config.optim.qk_clip else []
    place = config.checkpoint.path or folder / "checkpoints"
    return Parts(
        config=config,
        mesh=mesh,
        folder=folder,
        events=events,
        objective=objective,
        model_chunks=chunks,
        optimizer=optimizer,
        executor=executor,
        batch_source=batch_source,
        measurement=measurement,
        evaluator=Evaluator(executor, measurement.sums, objective.divisor, mesh, length),
        logit_clip=LogitClip(measurement.attention, clipped, mesh),
        balance=Balance(config.model, chunks),
        meters=Meters(choose_fp8_products(config.model, config.precision.fp8), find_meters(chunks)),
        checkpoints=Checkpointer(place, config.checkpoint, mesh, events=events.write),
    )


def build_trainer(
    config: Config,
    mesh: Mesh,
    folder: Path,
    *,
    objective: Objective | None = None,
    batch_source: BatchSource | None = None,
    hooks: Sequence[Hook] = (),
    peak_flops: float | None = None,
    environment: Mapping[str, object] | None = None,
    pulse: Pulse | None = None,
) -> Trainer:
    """Build a trainer of a resolved configuration with parts of its own; see `build_parts` and `Trainer`."""
    parts = build_parts(config, mesh, folder, objective=objective, batch_source=batch_source)
    return Trainer(parts, hooks=hooks, peak_flops=peak_flops, environment=environment, pulse=pulse)
