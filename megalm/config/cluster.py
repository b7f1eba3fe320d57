"""The machine that the run is planned for."""

from dataclasses import dataclass


@dataclass
class ClusterConfig:
    """Hardware and prices used by the planner; None: what this machine is found to be."""

    gpu: str | None = None
    """Name of the accelerator in the planner's hardware table."""
