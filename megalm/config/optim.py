"""The optimizer and the learning rate over time."""

from dataclasses import dataclass, field
from typing import Any

from megalm.config.fields import choice, number, open_choice

_USUAL = {"zclip": (2.5, 0.97, 25), "adagc": (1.05, 0.98, 100)}
"""Threshold, decay and warm-up as their papers have them."""


USUAL_RATIO = 0.1
"""Of the peak, at the end: what most schedules of language models go down to (Hoffmann et al. 2022)."""
USUAL_RESET_WARMUP = 150
"""Of SPAM (arXiv:2501.06842), after a reset every 500 updates."""


STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",), "muon": ("muon_momentum",)}
"""What each update rule keeps beside every weight that it updates, in fp32."""
READS = {
    "adamw": ("betas", "eps", "update_clip"),
    "sgd": ("momentum", "nesterov"),
    "muon": ("betas", "eps", "muon"),
}
"""Settings that are read with a rule; the others' would do nothing. (muon leaves what is no matrix to adamw.)"""


@dataclass
class AdaptiveClipConfig:
    """Gradient clipping that learns what is usual, beside the fixed `clip_grad_norm`."""

    kind: str = choice("none", "zclip", "adagc")
    """zclip: the global norm against its moving average (Kumar et al. 2025, arXiv:2504.02507); adagc: each tensor's norm
    against its own (Wang et al. 2025, arXiv:2502.11034)."""
    threshold: float = number(0.0, at_least=0)
    """zclip: deviations above the mean (0: 2.5); adagc: times the usual norm (0: 1.05)."""
    decay: float = number(0.0, at_least=0, below=1)
    """Averaging factor of the usual norm; 0: the paper's, 0.97 for zclip, 0.98 for adagc."""
    warmup_steps: int = number(0, at_least=0)
    """Updates before it acts; 0: the paper's, 25 for zclip, 100 for adagc."""

    def __post_init__(self) -> None:
        """Replace each 0 by what it stands for."""
        if self.kind in _USUAL:
            threshold, decay, steps = _USUAL[self.kind]
            self.threshold = self.threshold or threshold
            self.decay = self.decay or decay
            self.warmup_steps = self.warmup_steps or steps


@dataclass
class MuonConfig:
    """optim=muon: how matrices are updated. All that is none is updated by adamw, with betas and eps."""

    momentum: float = number(0.95, at_least=0, below=1)
    """How much of the sum of past gradients each update keeps."""
    nesterov: bool = True
    """Look ahead by the momentum."""
    coefficients: str = choice("quintic", "jordan", "polar_express")
    """Of the Newton-Schulz steps: quintic (Megatron core's), jordan (the original's, torch.optim.Muon's), polar_express
    (arXiv:2505.16932)."""
    steps: int = number(5, at_least=1, at_most=20)
    """Newton-Schulz steps; each costs three products of the matrix's size."""
    scale: str = choice("match_rms", "jordan", "width")
    """What the update is multiplied by: match_rms gives it AdamW's size, so that lr and weight_decay mean what they mean for
    adamw (arXiv:2502.16982); jordan: sqrt(max(1, rows / columns)), with lr about 0.02; width: sqrt(rows / columns)."""
    split_heads: bool = False
    """Orthogonalise each head's queries, keys and values by themselves, not the projection of all heads."""
    adamw_rate: float = number(1.0, above=0)
    """Factor of lr for what adamw updates."""


@dataclass
class GroupConfig:
    """How some parameters are updated; the first group that takes a parameter counts."""

    roles: list[str] = field(default_factory=list)
    """matrix, expert_matrix, router, output, embedding, norm, bias; none: all."""
    names: list[str] = field(default_factory=list)
    """Patterns of tensors' names, such as layers.0.*; none: all."""
    rule: str | None = None
    """Update rule, such as adamw; None: the one that the parameters would have."""
    rate: float = number(1.0, at_least=0)
    """Factor of lr; 0 leaves the weights as they are."""
    weight_decay: float | None = number(None, at_least=0)
    """Decay per unit of lr; None: the one that the parameters would have."""


@dataclass
class OptimConfig:
    """The update rule and its numbers, global-norm clipping, warm-up and decay."""

    name: str = open_choice("adamw", STATES)
    """The update rule."""
    lr: float = number(3e-4, above=0)
    """Peak learning rate."""
    min_lr_ratio: float | None = number(None, at_least=0, at_most=1)
    """Share of lr at the end of the schedule, where min_lr is not given; None: a tenth."""
    min_lr: float | None = number(None, at_least=0)
    """Learning rate at the end of the schedule; None: `min_lr_ratio` of lr."""
    warmup_steps: int | None = number(None, at_least=0)
    """Steps of linear rise from zero to lr; None: 100, or a tenth of a run that is too short for them."""
    schedule: str = choice("cosine", "linear", "wsd", "constant")
    """cosine or linear decay to min_lr; wsd: stable, then linear decay over the last `decay_fraction`; constant."""
    decay_fraction: float = number(0.2, above=0, at_most=1)
    """wsd: share of the run that the decay takes."""
    betas: tuple[float, float] = number((0.9, 0.95), at_least=0, below=1)
    """adamw, and what muon leaves to it: averaging factors of the first and second moments."""
    eps: float = number(1e-8, above=0)
    """adamw, and what muon leaves to it: added to the root of the second moment."""
    momentum: float = number(0.9, at_least=0, below=1)
    """sgd: how much of the sum of past gradients each update keeps."""
    nesterov: bool = False
    """sgd: look ahead by the momentum (Nesterov 1983; Sutskever et al. 2013)."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """muon: how matrices are updated."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of an update rule that is not megalm's own, by name."""
    groups: list[GroupConfig] = field(default_factory=list)
    """Parameters that are updated otherwise than the rest, by role or name."""
    weight_decay: float = number(0.1, at_least=0)
    """Decay per unit of learning rate (sgd: added to the gradient); never applied to norms, biases and embeddings."""
    clip_grad_norm: float = number(1.0, at_least=0)
    """Gradients are scaled down to this global norm; 0: never."""
    adaptive_clip: AdaptiveClipConfig = field(default_factory=AdaptiveClipConfig)
    """Clipping by what is usual."""
    update_clip: bool = False
    """StableAdamW (Wortsman et al. 2023, arXiv:2304.13013): a tensor whose gradients its second moment does not explain is
    updated with lr / RMS; lets clip_grad_norm be 0."""
    qk_clip: float = number(0.0, at_least=0)
    """Query and key weights of a head whose largest attention logit exceeds this are scaled down until it does not (Kimi
    K2, arXiv:2507.20534: 100); 0: never."""
    reset_every: int = number(0, at_least=0)
    """Updates after which both moments start anew (SPAM, arXiv:2501.06842: 500; Stable-SPAM: 1000); 0: never."""
    reset_warmup_steps: int | None = number(None, at_least=0)
    """Updates over which the learning rate comes back, along half a cosine, after the moments started anew; None: 150, or
    three tenths of a shorter reset_every."""

    def __post_init__(self) -> None:
        """Derive what follows other values and was not given."""
        if self.min_lr is None:
            ratio = USUAL_RATIO if self.min_lr_ratio is None else self.min_lr_ratio
            # In figures that people write: a tenth of 3e-4 is 3e-5, and not its neighbour in binary.
            self.min_lr = float(f"{self.lr * ratio:.6g}")
        if self.reset_warmup_steps is None:
            short = 0 < self.reset_every <= USUAL_RESET_WARMUP
            self.reset_warmup_steps = self.reset_every * 3 // 10 if short else USUAL_RESET_WARMUP
