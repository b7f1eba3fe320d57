"""The best model for a budget: compute-optimal for training, or for training and serving together."""

from dataclasses import dataclass
from math import exp, log

from megalm.config import ConfigError


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token."""

    name: str
    e: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        """Predicted loss of N parameters after D tokens."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Tokens that bring N parameters to a loss; infinite when they never get there."""
        rest = loss - self.e - self.a / parameters**self.alpha
        return (self.b / rest) ** (1 / self.beta) if rest > 0 else float("inf")

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss for 6 N D = flops: N = G (C/6)^(beta/(alpha+beta))."""
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        parameters = g * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters


LAWS = {
    "besiroglu": Law(
        "besiroglu",
        1.8172,
        482.01,
        2085.43,
        0.3478,
        0.3658,
        "Besiroglu et al. 2024 (arXiv:2404.10102): Chinchilla's data fitted again",
    ),
    "hoffmann": Law("hoffmann", 1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022 (arXiv:2203.15556), approach 3"),
}

TOKENS_PER_PARAMETER = {
    "Chinchilla 70B": (1.4e12, 70e9),
    "Llama-2 7B": (2e12, 7e9),
    "Llama-2 70B": (2e12, 70e9),
    "Llama-3 8B": (15e12, 8e9),
    "Llama-3 70B": (15e12, 70e9),
}
"""Published (tokens, parameters): Hoffmann et al. 2022; Touvron et al. 2023 (Llama 2); Meta 2024 (Llama 3)."""

SMALLEST = 1e6
"""Below a million parameters the laws say nothing."""


@dataclass(frozen=True)
class Choice:
    """One way to spend the budget."""

    name: str
    parameters: float
    tokens: float
    loss: float
    training_flops: float
    inference_flops: float
    why: str

    @property
    def ratio(self) -> float:
        """Tokens a parameter."""
        return self.tokens / self.parameters


def list_choices(
    flops: float,
    *,
    inference_tokens: float = 0.0,
    inference_cost: float = 1.0,
    law: Law | None = None,
    ratio: float = 20.0,
) -> list[Choice]:
    """Models for `flops` of training, and lifecycle-optimal ones when tokens will be served.

    Args:
        flops: what the budget buys, at the training utilisation.
        inference_tokens: tokens read and written over the model's life, 2 N FLOPs each.
        inference_cost: cost of a serving FLOP in training FLOPs (training MFU / serving MFU).
    Errors: ConfigError for a budget below what the smallest model needs.
    """
    fitted = law or LAWS["besiroglu"]
    least = 6 * SMALLEST * ratio * SMALLEST
    if flops < least:
        raise ConfigError(
            f"the budget buys {flops:.2g} FLOPs, less than the {least:.2g} of {SMALLEST:.0e} parameters on {ratio:g} tokens each:"
            " no language model can be trained for it. Raise dollars= or gpu_days=."
        )

    def make(name: str, parameters: float, tokens: float, why: str) -> Choice:
        serving = 2 * parameters * inference_tokens * inference_cost
        return Choice(name, parameters, tokens, fitted.loss(parameters, tokens), 6 * parameters * tokens, serving, why)

    size = (flops / (6 * ratio)) ** 0.5
    first = make(
        f"attempt 1: compute-optimal, {ratio:g} tokens a parameter", size, ratio * size, "Chinchilla's rule of thumb"
    )
    best = make(
        "attempt 1: compute-optimal, fitted law",
        *fitted.optimum(flops),
        f"least loss for the training FLOPs; {fitted.source}",
    )
    answers = [first, best]
    if inference_tokens:
        answers.append(_whole_budget(make, flops, inference_tokens * inference_cost, fitted))
        answers.append(_same_loss(make, best, inference_tokens * inference_cost, fitted))
    return answers


def _whole_budget(make, flops: float, served: float, law: Law) -> Choice:
    """Least loss when the budget pays for training and serving: 6 N D + 2 N T = C."""

    def loss(log_size: float) -> float:
        size = exp(log_size)
        tokens = flops / (6 * size) - served / 3
        return law.loss(size, tokens) if tokens > 0 else float("inf")

    size = exp(find_minimum(loss, log(SMALLEST / 1e3), log(flops)))
    tokens = flops / (6 * size) - served / 3
    return make(
        "attempt 2: lifecycle-optimal, whole budget", size, tokens, "least loss when the budget also pays for serving"
    )


def _same_loss(make, reference: Choice, served: float, law: Law) -> Choice:
    """Least FLOPs over the life at the loss of the compute-optimal model (Sardana et al. 2023, arXiv:2401.00448)."""

    def life(log_size: float) -> float:
        size = exp(log_size)
        tokens = law.tokens_for(size, reference.loss)
        return log(6 * size * tokens + 2 * size * served) if tokens < 1e30 else float("inf")

    smallest = (law.a / (reference.loss - law.e)) ** (1 / law.alpha)
    size = exp(find_minimum(life, log(smallest) + 1e-6, log(reference.parameters * 4)))
    tokens = law.tokens_for(size, reference.loss)
    return make(
        "attempt 2: lifecycle-optimal, same loss",
        size,
        tokens,
        "least training + serving FLOPs at the fitted optimum's loss",
    )


def find_minimum(function, low: float, high: float) -> float:
    """Argument of the least value of a function with one valley, by golden section after a scan for the valley."""
    grid = [low + (high - low) * i / 400 for i in range(401)]
    at = min(range(401), key=lambda i: function(grid[i]))
    low, high = grid[max(0, at - 1)], grid[min(400, at + 1)]
    golden = (5**0.5 - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    for _ in range(80):
        if function(left) < function(right):
            high, right = right, left
            left = high - golden * (high - low)
        else:
            low, left = left, right
            right = low + golden * (high - low)
    return (low + high) / 2
