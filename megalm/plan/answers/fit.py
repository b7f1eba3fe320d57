"""A scaling law out of finished runs."""

from typing import Any

from megalm.architecture.tensors import count_parameters
from megalm.config import ConfigError
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.page.plots import Line, Lines
from megalm.plan.budget import Law
from megalm.plan.report import Report
from megalm.plan.request import Request
from megalm.plan.scaling import fit, read_points

HELP = "fit a scaling law to finished runs and extrapolate with its uncertainty"
KEYS = ["parameters", "tokens", "form"]
EXAMPLE = "megalm plan fit runs/a runs/b runs/c parameters=30e9 tokens=600e9"
FILES = "RUN"
"""Words without `=` are files of this kind."""


def answer(request: Request) -> Report:
    """Fit, show how well it holds, and extrapolate to the size and tokens asked for."""
    if not request.files:
        raise ConfigError("no runs: name run folders, or a .csv with parameters, tokens and loss.")
    points = read_points(request.files)
    law = fit(points, request.word("form"))
    rows = [
        (p.name, format_count(p.parameters, 4), format_count(p.tokens, 4), f"{p.loss:.4f}",
         f"{law.predict(p.parameters, p.tokens):.4f}", f"{100 * (law.predict(p.parameters, p.tokens) / p.loss - 1):+.2f}")
        for p in sorted(points, key=lambda p: p.parameters * p.tokens)
    ]  # fmt: skip
    spread = {name: _spread(law, name) for name in law.values}
    data: dict[str, Any] = {
        "form": law.form,
        "runs": len(points),
        "law": law.values,
        "law_90_percent": {name: [low, high] for name, (low, high) in spread.items()},
        "residual_percent": 100 * law.residual,
        "points": [{"name": p.name, "parameters": p.parameters, "tokens": p.tokens, "loss": p.loss} for p in points],
    }
    headers = ("run", "parameters", "tokens", "loss (nats)", "fitted (nats)", "error (%)")
    formula = "L = E + A/N^alpha + B/D^beta" if law.form == "chinchilla" else "L = K (6 N D)^-gamma"
    blocks: list = [
        Table(f"{formula}, fitted to {len(points)} runs", headers, rows, f"residual {100 * law.residual:.2f}%"),
        Table(
            "the law",
            ("", "fitted", "90% of refits from", "to"),
            [
                (name, f"{value:.4g}", f"{spread[name][0]:.4g}", f"{spread[name][1]:.4g}")
                for name, value in law.values.items()
            ],
        ),
    ]
    size = request.number("parameters")
    if size is None and request.has_model:
        from megalm.plan.request import compose

        size = float(count_parameters(compose(request).model).total)
    if size:
        tokens = request.number("tokens") or 20 * size
        low, high = law.interval(size, tokens)
        expected = law.predict(size, tokens)
        data["extrapolation"] = {
            "parameters": size, "tokens": tokens, "loss_nats": expected, "loss_nats_90_percent": [low, high],
            "times_beyond_the_largest_run": size * tokens / max(p.parameters * p.tokens for p in points),
        }  # fmt: skip
        blocks.append(
            Table(
                "extrapolation",
                ("parameters", "tokens", "loss (nats)", "90% from", "to", "compute beyond the largest run (times)"),
                [(format_count(size), format_count(tokens), f"{expected:.4f}", f"{low:.4f}", f"{high:.4f}",
                  f"{data['extrapolation']['times_beyond_the_largest_run']:.1f}")],
            )
        )  # fmt: skip
    if law.form == "chinchilla":
        v = law.values
        own = Law("fitted", v["E"], v["A"], v["B"], v["alpha"], v["beta"], "these runs")
        best = [(c, own.optimum(c)) for c in (10.0**k for k in range(18, 26))]
        data["compute_optimal"] = [
            {"flops": c, "parameters": n, "tokens": d, "tokens_per_parameter": d / n, "loss_nats": own.loss(n, d)}
            for c, (n, d) in best
        ]
        blocks.append(
            Table(
                "compute-optimal by this law",
                ("FLOPs", "parameters", "tokens", "tokens a parameter", "loss (nats)"),
                [
                    (format_count(c), format_count(n), format_count(d), f"{d / n:.1f}", f"{own.loss(n, d):.3f}")
                    for c, (n, d) in best
                ],
            )
        )
    measured = sorted((6 * p.parameters * p.tokens, p.loss, law.predict(p.parameters, p.tokens)) for p in points)
    blocks.append(
        Lines(
            "loss against compute",
            "FLOPs (6 N D)",
            "loss (nats)",
            [Line("fitted", [(c, fitted) for c, _, fitted in measured])],
            log="x",
            dots=[("", c, loss) for c, loss, _ in measured],
        )
    )  # fmt: skip
    return Report("scaling law", data, blocks)


def _spread(law, name: str) -> tuple[float, float]:
    import numpy

    names = list(law.values)
    column = law.samples[:, names.index(name)]
    if name in ("E", "A", "B", "K"):
        column = numpy.exp(column)
    low, high = numpy.quantile(column, [0.05, 0.95])
    return float(low), float(high)
