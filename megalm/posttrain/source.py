"""Where a run's batches come from: token files, or its own texts; and the hooks that come with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.config import Config
from megalm.data.loader import Loader
from megalm.parallel.mesh import Mesh
from megalm.posttrain.hook import RolloutHook
from megalm.posttrain.reference import make_preparing_hooks
from megalm.posttrain.rollout import RolloutSource
from megalm.train.batch_source import BatchSource
from megalm.train.hooks import Hook


@dataclass(frozen=True)
class Opened:
    """A source of batches on this rank."""

    source: BatchSource
    preparing: Sequence[Hook] = ()
    """Complete it before any batch is asked for."""
    watching: Sequence[Hook] = ()
    """Look at what its batches were like."""


def open_source(config: Config, mesh: Mesh, folder: Path) -> Opened:
    """Open what the objective learns from. folder: the run's."""
    if config.objective.name == "policy":
        rollouts = RolloutSource(config, mesh)
        return Opened(rollouts, watching=[RolloutHook(config, folder, rollouts)])
    loader = Loader(config, mesh.data)
    return Opened(loader, preparing=make_preparing_hooks(config, loader))
