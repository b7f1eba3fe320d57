"""What is watched where a run learns from its own texts, and what follows."""

from dataclasses import dataclass, field

from megalm.config.errors import ConfigError
from megalm.config.fields import number

CAUSES = ("flat", "cut", "entropy", "kl", "mismatch", "length", "repeated", "reward", "accuracy")
"""What can be wrong with rollouts."""
ANSWERS = ("event", "lower_rate", "pause", "stop")


@dataclass
class RolloutGuardConfig:
    """Limits on what is written and how it is rewarded. Each is told once it has held for `patience` rollouts in a row, and again
    only after it was kept in between."""

    patience: int = number(5, at_least=1)
    """Rollouts in a row; also the rollouts of the windows whose rewards are compared."""
    flat: float = number(0.9, above=0, at_most=1)
    """Share of groups whose completions all have one reward: nothing is learned from those, be they too hard or solved."""
    cut: float = number(0.5, above=0, at_most=1)
    """Share of completions cut at rollout.max_tokens: a limit below the answer's length makes every reward 0."""
    entropy_low: float = number(0.1, at_least=0, below=1)
    """Entropy, as a share of the first rollouts', below which the policy has stopped to try anything ..."""
    entropy_high: float = number(2.0, above=1)
    """... and above which it falls apart."""
    kl: float = number(1.0, above=0)
    """k3 to the reference, nats a token, where it is measured."""
    mismatch: float = number(1e-2, above=0)
    """Mean |log p - log q| between trainer and sampler in the first update after a rollout, where the weights are the same:
    1e-6 in fp32, some 1e-3 in bf16."""
    length_factor: float = number(3.0, above=1)
    """Times that the mean length may grow over, or shrink under, the first rollouts'."""
    repeated: float = number(0.3, above=0, at_most=1)
    """Share of n-grams that stood in their completion before, where it is also twice the first rollouts'."""
    lower_rate: float = number(0.5, above=0, below=1)
    """What the answer lower_rate multiplies the learning rate by."""
    answers: dict[str, str] = field(default_factory=dict)
    """What follows on each cause (flat, cut, entropy, kl, mismatch, length, repeated, reward: one falls while the sum rises,
    accuracy: the sum rises, and no verifier does). event: it is told, with samples, which is the default; lower_rate; pause: a
    checkpoint, and the run ends, to go on by the same command when the samples were read; stop: it has failed."""


def check_rollout_guard(config: RolloutGuardConfig) -> None:
    """Errors: ConfigError for a cause or an answer that is not known."""
    for cause, answer in config.answers.items():
        if cause not in CAUSES or answer not in ANSWERS:
            raise ConfigError(
                f"guard.rollout.answers: {cause}: {answer}: a cause is one of {', '.join(CAUSES)}, an answer one of "
                f"{', '.join(ANSWERS)}."
            )
