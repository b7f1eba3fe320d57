"""Typed configuration: dataclasses, composed by Hydra from the yaml groups in conf/."""

from megalm.config.checkpoint import CheckpointConfig
from megalm.config.cluster import ClusterConfig
from megalm.config.data import DataConfig
from megalm.config.errors import ConfigError
from megalm.config.guard import GuardConfig
from megalm.config.model import ModelConfig, MoEConfig, RopeScalingConfig
from megalm.config.optim import OptimConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.precision import PrecisionConfig
from megalm.config.resilience import ResilienceConfig
from megalm.config.root import Config, OpsConfig, RunConfig
from megalm.config.tracking import TrackingConfig
from megalm.config.train import TrainConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
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
