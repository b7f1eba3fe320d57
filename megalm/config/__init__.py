"""Typed configuration: dataclasses, composed by Hydra from the yaml groups in conf/.

The classes are imported at their first use: the data tools and their worker processes need only ConfigError, and
Hydra's libraries would take longer to import than a small job takes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megalm.config.errors import ConfigError

if TYPE_CHECKING:
    from megalm.config.checkpoint import CheckpointConfig
    from megalm.config.cluster import ClusterConfig
    from megalm.config.data import DataConfig
    from megalm.config.evaluate import EvaluateConfig
    from megalm.config.guard import GuardConfig
    from megalm.config.model import ModelConfig, MoEConfig, RopeScalingConfig
    from megalm.config.optim import OptimConfig
    from megalm.config.parallel import ParallelConfig
    from megalm.config.precision import PrecisionConfig
    from megalm.config.resilience import ResilienceConfig
    from megalm.config.root import Config, OpsConfig, RunConfig
    from megalm.config.tracking import TrackingConfig
    from megalm.config.train import TrainConfig

_MODULES = {
    "CheckpointConfig": "checkpoint",
    "ClusterConfig": "cluster",
    "Config": "root",
    "DataConfig": "data",
    "EvaluateConfig": "evaluate",
    "GuardConfig": "guard",
    "MoEConfig": "model",
    "ModelConfig": "model",
    "OpsConfig": "root",
    "OptimConfig": "optim",
    "ParallelConfig": "parallel",
    "PrecisionConfig": "precision",
    "ResilienceConfig": "resilience",
    "RopeScalingConfig": "model",
    "RunConfig": "root",
    "TrackingConfig": "tracking",
    "TrainConfig": "train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "GuardConfig",
    "MoEConfig",
    "ModelConfig",
    "OpsConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ResilienceConfig",
    "RopeScalingConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
]
