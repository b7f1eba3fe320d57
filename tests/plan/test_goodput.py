"""Failures, checkpoints, spares, budgets and scaling laws."""

import json
import math
import random

import pytest

from megalm.config import ConfigError
from megalm.plan.budget import LAWS, list_choices
from megalm.plan.goodput import (
    compute_young_daly,
    estimate_checkpoint_loss,
    estimate_goodput,
    estimate_mtti_seconds,
    tabulate_spares,
)
from megalm.plan.ladder import build_ladder, interpolate_learning_rate
from megalm.plan.models import read_model
from megalm.plan.scaling import Point, fit, read_points


def simulated_loss(interval: float, stall: float, mtti: float, seed: int = 0) -> float:
    """Share of the wall clock lost when failures come at random and work since the last save is repeated."""
    generator = random.Random(seed)
    clock = done = 0.0
    failure = generator.expovariate(1 / mtti)
    while clock < 3000 * mtti:
        if clock + interval + stall <= failure:
            clock, done = clock + interval + stall, done + interval
        else:
            clock, failure = failure, failure + generator.expovariate(1 / mtti)
    return 1 - done / clock


def test_young_daly_is_the_best_interval():
    stall, mtti = 60.0, 7.8 * 3600
    best = compute_young_daly(stall, mtti)
    assert estimate_checkpoint_loss(best, stall, mtti) < estimate_checkpoint_loss(best * 0.8, stall, mtti)
    assert estimate_checkpoint_loss(best, stall, mtti) < estimate_checkpoint_loss(best * 1.25, stall, mtti)
    assert estimate_checkpoint_loss(best, stall, mtti) == pytest.approx(simulated_loss(best, stall, mtti), abs=0.004)


def test_llama3_failure_rate():
    """419 unexpected interruptions in 54 days on 16,384 H100 (Llama 3, 2024)."""
    assert estimate_mtti_seconds(16384, 1000 * 419 / (54 * 16384)) / 3600 == pytest.approx(54 * 24 / 419, rel=1e-9)


def test_no_failures_no_losses():
    result = estimate_goodput(8, 0.0, days=3)
    assert result.effective == 1.0 and result.best_spares == 0 and result.expected_failures == 0
    assert result.as_dict()["mtti_hours"] is None


def test_spares_pay_until_they_cost_more_than_they_save():
    rows = tabulate_spares(384, 7.8 * 3600, 24 * 3600)
    costs = [row["relative_cost"] for row in rows]
    best = costs.index(min(costs))
    assert 0 < best < len(rows) - 1
    assert all(a > b for a, b in zip(costs[:best], costs[1 : best + 1], strict=True))
    waits = [row["waiting_percent"] for row in rows]
    assert waits == sorted(waits, reverse=True)


def test_losses_grow_with_the_interval_given():
    assert (
        estimate_goodput(1024, 1.0, stall=5, interval=7200).effective < estimate_goodput(1024, 1.0, stall=5).effective
    )


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_the_laws_optimum_is_its_minimum(law):
    flops = 1e22
    size, tokens = law.optimum(flops)
    assert 6 * size * tokens == pytest.approx(flops)
    best = law.loss(size, tokens)
    for factor in (0.7, 0.9, 1.1, 1.5):
        assert law.loss(size * factor, tokens / factor) > best


def test_chinchilla_itself():
    """Hoffmann et al. 2022: 5.76e23 FLOPs are Chinchilla's 70B on 1.4T tokens at 20 tokens a parameter."""
    rule = list_choices(5.76e23)[0]
    assert rule.parameters == pytest.approx(70e9, rel=0.02) and rule.tokens == pytest.approx(1.4e12, rel=0.02)


def test_serving_makes_the_best_model_smaller_and_longer_trained():
    _, optimal, whole, same = list_choices(1e23, inference_tokens=5e12)
    assert whole.parameters < optimal.parameters and whole.ratio > optimal.ratio
    assert whole.training_flops + whole.inference_flops == pytest.approx(1e23, rel=1e-6)
    assert same.loss == pytest.approx(optimal.loss, rel=1e-9)
    assert same.parameters < optimal.parameters and same.ratio > optimal.ratio
    assert same.training_flops + same.inference_flops < optimal.training_flops + optimal.inference_flops


def test_a_budget_for_nothing():
    with pytest.raises(ConfigError, match="no language model can be trained"):
        list_choices(1e12)


def runs(noise: float = 0.002) -> list[Point]:
    law, generator = LAWS["besiroglu"], random.Random(1)
    sizes = [(n, n * ratio) for n in (1e7, 3e7, 1e8, 3e8, 1e9) for ratio in (5, 20, 80)]
    return [Point("run", n, d, law.loss(n, d) * math.exp(generator.gauss(0, noise))) for n, d in sizes]


def test_fit_recovers_a_law_and_its_uncertainty_covers_the_truth():
    law = fit(runs())
    assert law.values["E"] == pytest.approx(1.8172, rel=0.05)
    assert law.values["alpha"] == pytest.approx(0.3478, rel=0.1)
    truth = LAWS["besiroglu"].loss(30e9, 600e9)
    low, high = law.interval(30e9, 600e9)
    assert low < truth < high and high - low < 0.1
    assert law.predict(30e9, 600e9) == pytest.approx(truth, rel=0.02)


def test_exact_points_are_fitted_exactly():
    law = fit(runs(noise=0.0), refits=3)
    assert law.values["beta"] == pytest.approx(0.3658, rel=1e-3) and law.residual < 1e-5


def test_few_or_alike_runs_are_refused_or_fitted_by_a_power_law():
    alike = [point for point in runs() if point.tokens / point.parameters == 20]
    assert fit(alike).form == "power"
    with pytest.raises(ConfigError, match="at least 3"):
        fit(alike[:2])
    with pytest.raises(ConfigError, match="cannot tell"):
        fit([*alike, *alike], form="chinchilla")


def test_ladder_climbs_to_the_target():
    target = read_model("30b")
    rungs = build_ladder(target, 5)
    sizes = [rung.parameters for rung in rungs]
    assert sizes == sorted(sizes) and rungs[-1].model is target
    assert all(rung.tokens == pytest.approx(20 * rung.parameters) for rung in rungs)
    assert [rung.lr for rung in rungs] == sorted((rung.lr for rung in rungs), reverse=True)
    assert rungs[0].model.vocab_size == target.vocab_size and rungs[0].model.position == target.position


@pytest.mark.parametrize("size,lr", [(125e6, 6e-4), (1.3e9, 2e-4), (13e9, 1e-4), (175e9, 0.6e-4)])
def test_learning_rates_of_gpt3(size, lr):
    """Brown et al. 2020, table 2.1."""
    assert interpolate_learning_rate(size) == pytest.approx(lr)


def test_finished_runs_are_read_from_their_folders(tmp_path):
    law = LAWS["besiroglu"]
    names = []
    for size, tokens in ((1e7, 2e8), (3e7, 6e8), (1e8, 2e9)):
        folder = tmp_path / f"{size:g}"
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps({"parameters": size}))
        lines = [{"step": i, "loss": 9.0, "tokens": tokens * i / 4, "eval/loss": None} for i in range(1, 4)]
        lines.append({"step": 4, "loss": 3.0, "tokens": tokens, "eval/loss": law.loss(size, tokens)})
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        names.append(str(folder))
    points = read_points(names)
    assert [point.tokens for point in points] == [2e8, 6e8, 2e9]
    assert points[2].loss == law.loss(1e8, 2e9)
    (tmp_path / "1e+07" / "plan.json").unlink()
    with pytest.raises(ConfigError, match="not a finished run"):
        read_points(names)
