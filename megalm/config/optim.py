"""The optimizer and the learning rate over time."""

from dataclasses import dataclass, field

from megalm.config.fields import choice

_USUAL = {"zclip": (2.5, 0.97, 25), "adagc": (1.05, 0.98, 100)}
"""Threshold, decay and warm-up as their papers have them."""


@dataclass
class AdaptiveClipConfig:
    """Gradient clipping that learns what is usual, beside the fixed `clip_grad_norm`."""

    kind: str = choice("none", "zclip", "adagc")
    """zclip: the global norm against its moving average (Kumar et al. 2025, arXiv:2504.02507); adagc: each tensor's norm
    against its own (Wang et al. 2025, arXiv:2502.11034)."""
    threshold: float = 0.0
    """zclip: deviations above the mean (0: 2.5); adagc: times the usual norm (0: 1.05)."""
    decay: float = 0.0
    """Averaging factor of the usual norm; 0: the paper's, 0.97 for zclip, 0.98 for adagc."""
    warmup_steps: int = 0
    """Updates before it acts; 0: the paper's, 25 for zclip, 100 for adagc."""

    def __post_init__(self) -> None:
        """Replace each 0 by what it stands for."""
        if self.kind in _USUAL:
            threshold, decay, steps = _USUAL[self.kind]
            self.threshold = self.threshold or threshold
            self.decay = self.decay or decay
            self.warmup_steps = self.warmup_steps or steps


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
    adaptive_clip: AdaptiveClipConfig = field(default_factory=AdaptiveClipConfig)
    """Clipping by what is usual."""
    update_clip: bool = False
    """StableAdamW (Wortsman et al. 2023, arXiv:2304.13013): a tensor whose gradients its second moment does not explain is
    updated with lr / RMS; lets clip_grad_norm be 0."""
    qk_clip: float = 0.0
    """Query and key weights of a head whose largest attention logit exceeds this are scaled down until it does not (Kimi
    K2, arXiv:2507.20534: 100); 0: never."""
    reset_every: int = 0
    """Updates after which both moments start anew (SPAM, arXiv:2501.06842: 500; Stable-SPAM: 1000); 0: never."""
    reset_warmup_steps: int = 150
    """Updates over which the learning rate comes back, along half a cosine, after the moments started anew."""
