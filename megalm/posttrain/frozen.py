"""The weights that a run began with, held beside those in training: how likely they find what the policy wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megalm.config import Config
from megalm.convert.formats import open_source
from megalm.data.batch import Batch
from megalm.generate.model import fill_weights
from megalm.model.head import Head
from megalm.objectives.objective import Objective, Outcome
from megalm.objectives.policy import PolicyBatch
from megalm.parallel.context import number_zigzag_positions, shard_batch
from megalm.parallel.mesh import Mesh
from megalm.pipeline.execute import Executor
from megalm.precision.policy import make_policy
from megalm.train.build import build_chunks, choose_schedule, find_local_seq_length


class TokenScores(Objective):
    """Reports the log-probability of every label. Shapes: fp32 [S/c, B]"""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, head: Head, hidden: Tensor, batch: Batch) -> Outcome:
        scores = head.log_probabilities(hidden, batch.labels.t(), self.temperature)
        return Outcome(scores.sum(), {"scores": scores})


class Reference:
    """Frozen chunks on the run's own layout, with the weights of checkpoint.load_path, else with those that the seed draws.

    Memory: the weights once more, without gradients and moments.
    Errors: ConfigError for a folder whose weights are another model's
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.mesh, self.temperature = mesh, config.rollout.temperature
        chunks = build_chunks(config, mesh)
        if config.checkpoint.load_path is not None:
            weights = open_source(Path(config.checkpoint.load_path)).weights
            with torch.no_grad():
                for chunk in chunks:
                    fill_weights(chunk, weights)
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        self.executor = Executor(
            chunks,
            choose_schedule(config, mesh.data.size),
            mesh.pipeline,
            micro_batch_size=config.train.micro_batch_size,
            seq_length=find_local_seq_length(config, mesh),
            hidden_size=config.model.hidden_size,
            dtype=make_policy(config.precision, config.model).weights,
            device=mesh.device,
        )

    def score(self, batches: Sequence[PolicyBatch]) -> list[PolicyBatch]:
        """The batches with `reference` filled in where this rank will need it: on the last stage, at its own positions."""
        own = [shard_batch(batch.to(self.mesh.device), self.mesh.context) for batch in batches]
        reports = self.executor.evaluate(own, TokenScores(self.temperature))
        scored = []
        for batch, report in zip(batches, reports, strict=True):
            whole = torch.zeros(batch.tokens.shape)
            if "scores" in report:
                places = number_zigzag_positions(batch.tokens.shape[1], self.mesh.context)
                whole[:, places] = report["scores"].t().float().cpu()
            scored.append(replace(batch, reference=whole))
        return scored
