"""How a policy learns from texts that it wrote itself: the settings of objective.name=policy."""

from dataclasses import dataclass

from megalm.config.effects import Course
from megalm.config.errors import ConfigError
from megalm.config.fields import choice, number


@dataclass
class PolicyConfig:
    """The surrogate of a policy's gradient. objective=grpo, dr_grpo, dapo, gspo, cispo and rloo set these as their authors do."""

    ratio: Course[str] = choice("token", "sequence", "trajectory", "truncated")
    """What is compared of policy and sampler, p / p_old. token: each token's probability; sequence: the geometric mean over a
    text (GSPO, arXiv:2507.18071); trajectory: the whole text's (RLOO); truncated: each token's, cut off above and not
    differentiated (CISPO, arXiv:2506.13585)."""
    clip_low: Course[float] = number(0.2, at_least=0, below=1)
    """A ratio below 1 - this gives no gradient where it would shrink further."""
    clip_high: Course[float] = number(0.28, above=0)
    """A ratio above 1 + this gives no gradient where it would grow further (DAPO's, arXiv:2503.14476, is the larger one)."""
    dual_clip: Course[float] = number(3.0, at_least=0, infinite=True)
    """Of texts worse than their group, a loss is at most this times the advantage (Ye et al. 2020, arXiv:1912.09729); 0: no
    limit."""
    aggregate: Course[str] = choice("tokens", "sequences", "budget")
    """What the loss is a mean over. tokens: all tokens of the step (DAPO); sequences: texts, of their mean over tokens (GRPO);
    budget: texts, of their sum over rollout.max_tokens (Dr. GRPO). None of them depends on ranks or micro-batches."""
    advantage: Course[str] = choice("standardized", "centered", "leave_one_out")
    """Of a reward within its group. standardized: (r - mean) / (std + 1e-4), std with n - 1; centered: r - mean (Dr. GRPO,
    arXiv:2503.20783); leave_one_out: r - mean of the others (RLOO, arXiv:2402.14740)."""
    kl: Course[float] = number(0.0, at_least=0)
    """Weight of the divergence from the weights that the run began with (checkpoint.load_path), which are then held beside;
    0: none."""
    kl_form: Course[str] = choice("k2", "k1", "k3", "k3_weighted", "k3_k2")
    """Its estimate for each token, with d = log p - log p_ref. k2: d^2 / 2, whose gradient is KL(p, p_ref)'s. k1: d, whose
    gradient is zero in the mean. k3: exp(-d) - 1 + d (GRPO), whose gradient is KL(p_ref, p)'s. k3_weighted: k3 times the
    token's ratio, whose gradient again is KL(p, p_ref)'s. k3_k2: k3's value with k2's gradient."""


def check_policy(policy: PolicyConfig) -> None:
    """Errors: ConfigError for settings that contradict each other."""
    if policy.ratio != "token" and policy.dual_clip != PolicyConfig.dual_clip and policy.dual_clip != 0:
        raise ConfigError(
            f"objective.policy.dual_clip={policy.dual_clip:g} limits ratios of tokens, and objective.policy.ratio="
            f"{policy.ratio}: leave it out."
        )
