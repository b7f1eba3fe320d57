"""What the run does by itself when the loss misbehaves: how it notices, what it may do about it, and how often."""

from dataclasses import dataclass, field

from megalm.config.errors import ConfigError
from megalm.config.fields import choice, number
from megalm.config.guard_rollout import RolloutGuardConfig, check_rollout_guard
from megalm.config.ranges import check_fields

ACTIONS = ("skip", "skip_data", "rollback", "lower_lr", "reseed", "widen", "give_up")


@dataclass
class DetectorConfig:
    """Constants of the spike detector (megalm/guard/detect.py). Counts are in samples of the curve, which are steps."""

    window: int = number(128, at_least=8)
    """Accepted samples that the baseline is made of: the median's error is 1.25 s/sqrt(n), and longer ones lag."""
    min_window: int = number(32, at_least=8)
    """No judgement but non-finite before so many samples: below it the spread's own error is above 15%."""
    scale_floor: float = number(0.004, above=0)
    """Smallest spread s of ln(loss): quieter runs (0.4% noise) would alarm on rounding and learning-rate steps."""
    gate: float = number(6.0, above=0)
    """z from which one step is refused. Healthy real data reach it 25 to 30 times in 10,000 steps."""
    gate_excess: float = number(0.05, at_least=0)
    """... and the loss must be 5% above its baseline: z = 6 on a very quiet curve harms nobody."""
    strong: float = number(3.0, at_least=0)
    """A run of outliers goes on while z is above this."""
    fall: float = number(0.7, above=0)
    """A fall is only odd when it drops at once below exp(-0.7), half, of the baseline: losses fall for good reasons all the
    time. After `persistence` such samples the new level is taken up."""
    gradient_gate: float = number(8.0, above=0)
    """z of ln(gradient norm) from which a step is refused; its tails are heavier than the loss'."""
    update_gate: float = number(1.5, above=0)
    """ln by which the size of the coming update may exceed its median, 4.5 times, before the step is refused: a lost
    second moment or a wrong learning rate. With betas 0.9 and 0.95 a gradient alone cannot do that (0.1 g / sqrt(0.05 g^2)
    is 0.45); at 0.999 the spike of one tensor's gradient can, and updates like that come before spikes of the loss."""
    spread_gate: float = number(0.5, above=0)
    """Nats by which the worst data rank's loss must exceed the ranks' median, beside z > gradient_gate, to be odd."""
    drift: float = number(0.5, at_least=0)
    """What a shift must exceed, in s, to be counted at all: half of the smallest shift that matters (Page 1954)."""
    alarm: float = number(22.0, above=0)
    """Sum of z beyond the drift from which a shift is declared; healthy real curves reached 15 in 130,000 steps."""
    clip: float = number(4.0, above=0)
    """The most that one sample may add to that sum."""
    persistence: int = number(11, at_least=1)
    """Samples that an episode must have lasted: ten bad batches in a row heal by themselves."""
    still: float = number(0.4, at_least=0, at_most=1)
    """The last two samples must each be above this share of the episode's mean z: an episode that is over is no shift."""
    healing: float = number(0.8, at_least=0, at_most=1)
    """An excess that shrank to less than this in five samples is healing by itself: the verdict waits ..."""
    healing_limit: int = number(30, at_least=0)
    """... but at most so many samples."""
    freeze: float = number(5.0, at_least=0)
    """The baseline learns nothing while the sum is above this."""
    freeze_limit: int = number(400, at_least=0)
    """... for at most so many samples; then the new level is taken as the baseline."""
    nonfinite_limit: int = number(4, at_least=1)
    """Non-finite steps in a row from which the weights are taken for lost. Loss scaling alone makes one or two."""


@dataclass
class RungConfig:
    """One rung of the ladder: an action, how often it may be taken, and its own numbers."""

    action: str = choice(*ACTIONS)
    """skip: refuse one update. skip_data: also jump over the next batches. rollback: back to before the onset, and skip
    the data around it. lower_lr, reseed: a rollback with a lower learning rate, or with new random numbers for dropout and
    the rest of the data in another order. widen: a rollback, and 8-bit products in precision.dtype from then on. give_up:
    stop with a report, exit status 3."""
    budget: int = number(1, at_least=0)
    """Times it may be taken within `within` steps; then the next rung that fits answers."""
    within: int = number(10000, at_least=0)
    """Steps that the budget is for."""
    in_a_row: int = number(0, at_least=0)
    """skip: after so many refused steps in a row the next rung answers; 0: no limit but the budget."""
    steps: int = number(8, at_least=0)
    """skip_data: batches to jump over; twice as many each time."""
    lr_scale: float = number(1.0, above=0, at_most=1)
    """lower_lr: factor on the scheduled learning rate ..."""
    rewarm_steps: int = number(1000, at_least=0)
    """... that returns to 1, linearly, over so many steps."""
    products: list[str] = field(default_factory=lambda: ["*"])
    """widen: patterns of products, as in precision.fp8.skip."""
    reset_moments: bool = False
    """rollback, lower_lr, reseed, widen: also start the optimizer's moments anew; the learning rate then comes back over
    optim.reset_warmup_steps."""


@dataclass
class ProvokeConfig:
    """Damage done on purpose, to see the guard at work (experiment=spike/...). Never set it in a real run."""

    kind: str = choice(
        "none",
        "random_tokens",
        "permuted_tokens",
        "repeated_token",
        "zero_second_moment",
        "lr_jump",
        "bit_flip",
        "gradient_scale",
    )
    """What is damaged: batches of random, permuted or one repeated token; the second moment set to zero; the learning
    rate multiplied; one bit of one weight of one rank; the gradients multiplied."""
    step: int = number(100, at_least=1)
    """First step of the damage."""
    steps: int = number(1, at_least=1)
    """Steps that it lasts: batches that are bad, or updates at the wrong learning rate."""
    times: int = number(1, at_least=1)
    """How often it strikes when the same steps come again (2: it also strikes the replay, as a true fault would)."""
    factor: float = number(30.0, infinite=True)
    """lr_jump, gradient_scale: the factor."""
    bit: int = number(30, at_least=0, at_most=31)
    """bit_flip: which bit of the fp32 weight (30: the exponent's highest)."""
    rank: int = number(0, at_least=0)
    """bit_flip: on which rank."""


@dataclass
class GuardConfig:
    """Detection of loss spikes and non-finite values, and the ladder of answers to them."""

    enabled: bool = True
    """Watch the run at all."""
    act: bool = True
    """Act on what is seen; false: only report it."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    """What counts as a spike."""
    rungs: list[RungConfig] = field(default_factory=list)
    """The ladder, gentlest first. An empty one only reports."""
    snapshot_lags: list[int] = number(lambda: [16, 64, 256], at_least=1)
    """Steps between snapshots in host memory: one for each lag, the older ones filled from the younger. Empty: none."""
    ring_memory_gb: float | None = number(None, at_least=0)
    """Host memory that the snapshots of one rank may take, GB; None: half of what is free, shared by the local ranks."""
    margin: int = number(4, at_least=0)
    """A snapshot is trusted when it is at least so many steps older than the onset of the trouble."""
    probe_sequences: int = number(8, at_least=0)
    """Held-out sequences of the probe that tells bad data from damaged weights; 0: no probe."""
    probe_excess: float = number(0.1, above=0)
    """Nats by which the probe's loss may exceed that of the newest trusted snapshot before the weights count as damaged.
    One bad batch adds about 0.01, a wrong learning rate 0.3, a lost second moment 30."""
    data_excess: float = number(0.15, above=0)
    """ln(loss) by which data must be harder for good, the weights being fine, to be left out; less is a change of the
    mixture that the run is to learn (from 3.0 nats to 3.5)."""
    attention_warning: float = number(100.0, at_least=0)
    """Largest attention logit from which a warning is written, and again at each doubling: without QK-norm or QK-clip they
    go on growing (Kimi K2 clips at 100; at 1e4 small models diverge, Wortsman et al. 2023); 0: never."""
    router_dead: float = number(0.5, above=0, at_most=1)
    """Share of a mixture's experts that get no token of a global batch from which its router counts as collapsing, ..."""
    router_patience: int = number(64, at_least=0)
    """... after so many such steps in a row: an event says which layer, and what helps; 0: never."""
    replay: bool = True
    """Repeat the steps since the last clean snapshot once: damage that does not come again was the hardware's."""
    replica_check_every: int = number(256, at_least=0)
    """Steps between comparisons of the weights of data-parallel replicas, which must be equal bit by bit; 0: never."""
    recurrence: int = number(500, at_least=0)
    """Steps within which trouble counts as the same trouble again: rollbacks then go further back, and skip twice as much."""
    skip_before: int = number(20, at_least=0)
    """Batches before the onset that a rollback skips."""
    skip_after: int = number(50, at_least=0)
    """Batches after the alarm that a rollback skips."""
    skip_limit: int = number(500, at_least=0)
    """Batches that one rollback skips at most."""
    rollout: RolloutGuardConfig = field(default_factory=RolloutGuardConfig)
    """What is watched where a run learns from its own texts."""
    provoke: ProvokeConfig = field(default_factory=ProvokeConfig)
    """Damage done on purpose."""


def count_ring_bytes(guard: GuardConfig, state_bytes: int) -> int:
    """Host memory of one rank's snapshots.

    Args:
        state_bytes: this rank's share of the fp32 weights and both moments (12 bytes a parameter, divided as ZeRO does).
    """
    if not (guard.enabled and guard.act and any(r.action in _GO_BACK for r in guard.rungs)):
        return 0
    return len(guard.snapshot_lags) * state_bytes


_GO_BACK = ("rollback", "lower_lr", "reseed", "widen")


def check_guard(guard: GuardConfig) -> None:
    """Raise ConfigError for a ladder or numbers that cannot work."""
    check_fields(guard, "guard.")
    for place, rung in enumerate(guard.rungs):
        where = f"guard.rungs[{place}]"
        if rung.reset_moments and rung.action not in _GO_BACK:
            raise ConfigError(
                f"{where}.reset_moments=true (action {rung.action}): only what goes back can start the moments anew: "
                f"{', '.join(_GO_BACK)}."
            )
        if rung.products != ["*"] and rung.action != "widen":
            raise ConfigError(f"{where}.products (action {rung.action}): only widen names products.")
        if rung.action == "lower_lr" and rung.lr_scale == 1:
            raise ConfigError(f"{where}: lower_lr needs lr_scale below 1, for example lr_scale: 0.7.")
    lags = list(guard.snapshot_lags)
    if lags != sorted(set(lags)):
        raise ConfigError(f"guard.snapshot_lags={lags}: positive numbers of steps, each larger than the one before.")
    if any(b % a for a, b in zip(lags, lags[1:], strict=False)):
        raise ConfigError(
            f"guard.snapshot_lags={lags}: each must be a multiple of the one before, as in [16, 64, 256]."
        )
    _check_detector(guard.detector)
    check_rollout_guard(guard.rollout)


def _check_detector(detector: DetectorConfig) -> None:
    if not 8 <= detector.min_window <= detector.window:
        raise ConfigError(
            f"guard.detector.min_window={detector.min_window}: must lie between 8 and guard.detector.window="
            f"{detector.window}."
        )
