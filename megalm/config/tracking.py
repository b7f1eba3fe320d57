"""Where measurements go, beside metrics.jsonl and events.jsonl."""

from dataclasses import dataclass, field


@dataclass
class TrackingConfig:
    """Extra outputs of a run's measurements."""

    tensorboard: bool = True
    """Write TensorBoard scalars to the run's folder."""
    trackers: list[str] = field(default_factory=list)
    """Further places: wandb, mlflow, or names of plugins' trackers."""
    project: str = "megalm"
    """W&B's project and MLflow's experiment, which hold the runs."""
    report: bool = True
    """Write report.html when the run ends."""
