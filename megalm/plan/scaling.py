"""Fitting a scaling law to finished runs, and extrapolating with its uncertainty."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from megalm.config import ConfigError
from megalm.journal import read_course

HUBER = 1e-3
"""Residuals of log-loss above this count linearly (Hoffmann et al. 2022, appendix D.3)."""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    name: str
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Fitted:
    """A fitted law with the spread of its refits."""

    form: str
    values: dict[str, float]
    residual: float
    """Root mean square of log(predicted / measured)."""
    samples: "numpy.ndarray"
    theta: "numpy.ndarray"

    def predict(self, parameters: float, tokens: float) -> float:
        """Predict loss at a size and a length."""
        return float(numpy.exp(_log_loss(self.form, self.theta, numpy.array([parameters]), numpy.array([tokens]))[0]))

    def interval(self, parameters: float, tokens: float, share: float = 0.9) -> tuple[float, float]:
        """Where `share` of the refits put the loss, widened by the residual scatter."""
        size, length = numpy.array([parameters]), numpy.array([tokens])
        losses = [float(_log_loss(self.form, theta, size, length)[0]) for theta in self.samples]
        middle = float(_log_loss(self.form, self.theta, size, length)[0])
        low, high = numpy.quantile(losses, [(1 - share) / 2, (1 + share) / 2])
        scatter = 1.645 * self.residual
        return (
            float(numpy.exp(middle - numpy.hypot(max(0.0, middle - low), scatter))),
            float(numpy.exp(middle + numpy.hypot(max(0.0, high - middle), scatter))),
        )


def read_points(files: Sequence[str]) -> list[Point]:
    """Points from run folders, or from csv/json/jsonl tables with parameters, tokens and loss.

    Errors: ConfigError for what cannot be read or lacks a column.
    """
    points: list[Point] = []
    for name in files:
        path = Path(name)
        if path.is_dir():
            points.append(_run(path))
        elif path.suffix in (".csv", ".json", ".jsonl"):
            points.extend(_table(path))
        else:
            raise ConfigError(
                f"{name}: neither the folder of a run nor a .csv, .json or .jsonl file with parameters, tokens, loss."
            )
    for point in points:
        if not (point.parameters > 0 and point.tokens > 0 and 0 < point.loss < float("inf")):
            raise ConfigError(f"{point.name}: parameters, tokens and loss must be positive and finite; got {point}.")
    return points


def _run(folder: Path) -> Point:
    """A run's size from plan.json, its tokens and final loss from metrics.jsonl (held-out loss where there is one)."""
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        lines = read_course(folder / "metrics.jsonl").steps
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: not a finished run; plan.json and metrics.jsonl are needed ({error}).") from None
    plan = plan.get("planned", plan) if isinstance(plan, dict) else {}
    steps = [line for line in lines if line.get("loss") is not None and "tokens" in line]
    if not steps or "parameters" not in plan:
        raise ConfigError(f"{folder}: its metrics.jsonl has no finished step, or plan.json no parameters.")
    held_out = [line["eval/loss"] for line in lines if line.get("eval/loss") is not None]
    tail = [line["loss"] for line in steps[-max(1, len(steps) // 50) :]]
    tail = [loss for loss in tail if math.isfinite(loss)] or tail[-1:]  # a step that was refused taught nothing
    loss = held_out[-1] if held_out else sum(tail) / len(tail)
    return Point(folder.name, float(plan["parameters"]), float(steps[-1]["tokens"]), float(loss))


def _table(path: Path) -> list[Point]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
        return [
            Point(
                str(row.get("name", f"{path.name}:{i}")),
                float(row["parameters"]),
                float(row["tokens"]),
                float(row["loss"]),
            )
            for i, row in enumerate(rows, 1)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read as a table of parameters, tokens and loss ({error}).") from None


def fit(points: Sequence[Point], form: str | None = None, refits: int = 60, seed: int = 0) -> Fitted:
    """Fit L = E + A/N^alpha + B/D^beta (chinchilla), or L = K C^-gamma with C = 6 N D (power), in log-loss.

    Uncertainty: refits with points drawn with replacement (bootstrap), each also jittered by the residual scatter.

    Errors: ConfigError for too few points, or points that do not tell N and D apart.
    """
    chosen = form or ("chinchilla" if _separable(points) else "power")
    needed = {"chinchilla": 6, "power": 3}
    if chosen not in needed:
        raise ConfigError(f"form={form}: chinchilla (E + A/N^alpha + B/D^beta) or power (K C^-gamma).")
    if len(points) < needed[chosen]:
        raise ConfigError(
            f"{len(points)} finished runs: the {chosen} form needs at least {needed[chosen]}"
            + (", with sizes and lengths that vary apart." if chosen == "chinchilla" else ".")
            + " Run more rungs (megalm plan ladder)."
        )
    if chosen == "chinchilla" and not _separable(points):
        raise ConfigError(
            "these runs all have about the same tokens a parameter: they cannot tell A/N^alpha from B/D^beta. Use form=power."
        )
    size = numpy.array([p.parameters for p in points])
    tokens = numpy.array([p.tokens for p in points])
    target = numpy.log([p.loss for p in points])
    theta = _best(chosen, size, tokens, target)
    residuals = _log_loss(chosen, theta, size, tokens) - target
    freedom = max(1, len(points) - len(theta))
    scatter = float(numpy.sqrt(numpy.sum(residuals**2) / freedom))
    generator = numpy.random.default_rng(seed)
    samples = []
    for _ in range(refits):
        drawn = generator.integers(0, len(points), len(points))
        while len(set(drawn.tolist())) < len(theta):
            drawn = generator.integers(0, len(points), len(points))
        noisy = target[drawn] + generator.normal(0.0, scatter, len(points))
        samples.append(_descend(chosen, theta, size[drawn], tokens[drawn], noisy))
    names = ("E", "A", "B", "alpha", "beta") if chosen == "chinchilla" else ("K", "gamma")
    values = [*numpy.exp(theta[:3]), *theta[3:]] if chosen == "chinchilla" else [float(numpy.exp(theta[0])), theta[1]]
    return Fitted(chosen, dict(zip(names, map(float, values), strict=True)), scatter, numpy.array(samples), theta)


def _separable(points: Sequence[Point]) -> bool:
    """Whether sizes and tokens a parameter both vary by more than a half, over six points or more."""
    if len(points) < 6:
        return False
    ratios = [p.tokens / p.parameters for p in points]
    sizes = [p.parameters for p in points]
    return max(ratios) > 1.5 * min(ratios) and max(sizes) > 1.5 * min(sizes)


def _log_loss(form: str, theta: "numpy.ndarray", size: "numpy.ndarray", tokens: "numpy.ndarray") -> "numpy.ndarray":
    if form == "power":
        return theta[0] - theta[1] * numpy.log(6 * size * tokens)
    terms = _terms(theta, size, tokens)
    top = terms.max(axis=0)
    return top + numpy.log(numpy.exp(terms - top).sum(axis=0))


def _terms(theta: "numpy.ndarray", size: "numpy.ndarray", tokens: "numpy.ndarray") -> "numpy.ndarray":
    e, a, b, alpha, beta = theta
    return numpy.stack([numpy.full_like(size, e), a - alpha * numpy.log(size), b - beta * numpy.log(tokens)])


def _gradient(form: str, theta: "numpy.ndarray", size: "numpy.ndarray", tokens: "numpy.ndarray") -> "numpy.ndarray":
    """d log L / d theta, one row a point."""
    if form == "power":
        return numpy.stack([numpy.ones_like(size), -numpy.log(6 * size * tokens)], axis=1)
    terms = _terms(theta, size, tokens)
    share = numpy.exp(terms - _log_loss(form, theta, size, tokens))
    return numpy.stack(
        [share[0], share[1], share[2], -share[1] * numpy.log(size), -share[2] * numpy.log(tokens)], axis=1
    )


def _best(form: str, size: "numpy.ndarray", tokens: "numpy.ndarray", target: "numpy.ndarray") -> "numpy.ndarray":
    """The best of descents from a grid of starts (Hoffmann et al. 2022 start from such a grid, too)."""
    if form == "power":
        starts = [numpy.array([float(target.mean()), 0.05])]
    else:
        floor = float(numpy.exp(target.min()))
        starts = [
            numpy.array(
                [numpy.log(floor * part), numpy.log(floor) + alpha * 18, numpy.log(floor) + beta * 21, alpha, beta]
            )
            for part in (0.3, 0.6, 0.85)
            for alpha in (0.2, 0.35, 0.5)
            for beta in (0.2, 0.35, 0.5)
        ]
    ends = [_descend(form, start, size, tokens, target) for start in starts]
    return min(ends, key=lambda theta: _objective(_log_loss(form, theta, size, tokens) - target))


def _objective(residuals: "numpy.ndarray") -> float:
    large = numpy.abs(residuals) > HUBER
    return float(numpy.where(large, HUBER * (numpy.abs(residuals) - HUBER / 2), residuals**2 / 2).sum())


def _descend(
    form: str, theta: "numpy.ndarray", size: "numpy.ndarray", tokens: "numpy.ndarray", target: "numpy.ndarray"
) -> "numpy.ndarray":
    """Levenberg-Marquardt with Huber weights."""
    damping = 1e-2
    residuals = _log_loss(form, theta, size, tokens) - target
    best = _objective(residuals)
    for _ in range(300):
        weights = 1.0 / numpy.maximum(1.0, numpy.abs(residuals) / HUBER)
        jacobian = _gradient(form, theta, size, tokens)
        normal = jacobian.T @ (weights[:, None] * jacobian)
        slope = jacobian.T @ (weights * residuals)
        step = numpy.linalg.lstsq(normal + damping * numpy.diag(numpy.diag(normal) + 1e-12), slope, rcond=None)[0]
        candidate = theta - step
        if form == "chinchilla":
            candidate[3:] = numpy.clip(candidate[3:], 0.02, 2.0)
        after = _log_loss(form, candidate, size, tokens) - target
        value = _objective(after)
        if value < best and numpy.isfinite(value):
            done = best - value < 1e-13
            theta, residuals, best, damping = candidate, after, value, damping / 3
            if done:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    return theta
