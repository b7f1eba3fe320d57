"""The optimizer and the learning rate over time."""

from dataclasses import dataclass

from megalm.config.fields import choice


@dataclass
class OptimConfig:
    """AdamW with decoupled decay (Loshchilov & Hutter 2019), global-norm clipping, warm-up and decay."""

    name: str = choice("adamw")
    """The update rule."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the schedule."""
    warmup_steps: int = 100
    """Steps of linear rise from zero to lr."""
    schedule: str = choice("cosine", "linear", "wsd", "constant")
    """cosine or linear decay to min_lr; wsd: stable, then linear decay over the last `decay_fraction`; constant."""
    decay_fraction: float = 0.2
    """wsd: share of the run that the decay takes."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Averaging factors of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay per unit of learning rate; never applied to norms, biases and embeddings."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
