"""The whole configuration of a run."""

from dataclasses import dataclass, field
from typing import Any

from megalm.config.checkpoint import CheckpointConfig
from megalm.config.cluster import ClusterConfig
from megalm.config.data import DataConfig
from megalm.config.effects import Aside, Course, Function, Layout, Measured
from megalm.config.evaluate import EvaluateConfig
from megalm.config.fields import choice, number, open_choice
from megalm.config.guard import GuardConfig
from megalm.config.model import ModelConfig
from megalm.config.objective import ObjectiveConfig
from megalm.config.optim import OptimConfig
from megalm.config.parallel import ParallelConfig
from megalm.config.precision import PrecisionConfig
from megalm.config.resilience import ResilienceConfig
from megalm.config.rollout import RolloutConfig
from megalm.config.tracking import TrackingConfig
from megalm.config.train import TrainConfig

ATTENTION_KERNELS = dict.fromkeys(
    ("auto", "cudnn", "fa4", "fa3", "flash", "flex", "efficient", "torch", "scores")
)  # a plugin's kernel adds its name
"""Words of ops.attention."""


@dataclass
class RunConfig:
    """What the run is called and where its folder is."""

    name: str = "run"
    """Name of the run's folder."""
    dir: str = "runs"
    """Folder that holds the runs' folders."""
    plugins: list[str] = field(default_factory=list)
    """Modules of your own that are imported in every process of the run, and register what they add (docs/extending.md)."""
    plugin_options: dict[str, Any] = field(default_factory=dict)
    """Settings of plugins, by whatever names they read."""


@dataclass
class OpsConfig:
    """Which implementation of the kernels serves."""

    backend: str = choice("auto", "native", "apex", "te", "reference")
    """auto: the compiled kernels where they are built; native: insist on them; apex, te: NVIDIA's apex (not PyPI's) or
    Transformer Engine for the ops that they have; reference: plain PyTorch."""
    attention: str = open_choice("auto", ATTENTION_KERNELS)
    """What computes attention. auto: on a GPU the fastest that gives what plain products give, and under
    train.determinism=strict the same bits each time; elsewhere torch's. cudnn, flash (FlashAttention-2), efficient: of torch;
    fa3, fa4: FlashAttention packages; flex: compiled FlexAttention; scores: plain products with all scores in memory."""


@dataclass
class Config:
    """Everything that decides a run. `python -m megalm.launch +model=tiny train.steps=100` sets its fields."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus and its order."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and batch sizes."""
    objective: Course[ObjectiveConfig] = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """What the run writes to learn from, where its objective wants that."""
    optim: Course[OptimConfig] = field(default_factory=OptimConfig)
    """Update rule and learning rate."""
    parallel: Layout[ParallelConfig] = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    precision: Function[PrecisionConfig] = field(default_factory=PrecisionConfig)
    """Number formats."""
    checkpoint: Aside[CheckpointConfig] = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    guard: Course[GuardConfig] = field(default_factory=GuardConfig)
    """Answers to loss spikes."""
    resilience: Aside[ResilienceConfig] = field(default_factory=ResilienceConfig)
    """Answers to dead and hanging ranks."""
    evaluate: Measured[EvaluateConfig] = field(default_factory=EvaluateConfig)
    """Tasks asked while it trains."""
    tracking: Aside[TrackingConfig] = field(default_factory=TrackingConfig)
    """Extra outputs of measurements."""
    cluster: Aside[ClusterConfig] = field(default_factory=ClusterConfig)
    """The machine to plan for."""
    ops: Layout[OpsConfig] = field(default_factory=OpsConfig)
    """Kernel backends."""
    run: Aside[RunConfig] = field(default_factory=RunConfig)
    """Name and folder."""
    world_size: Layout[int | None] = number(None, at_least=1)
    """Local ranks to start; None: one for each GPU, or on a CPU as many as the layout's axes multiply to."""
    device: Layout[str] = choice("auto", "cpu", "cuda")
    """Where tensors live; auto: GPUs when there are any."""
    dry_run: Aside[bool] = False
    """Plan, build on the meta device, print, and stop before training."""
