"""The detector: finds what lasts, lets pass what heals, learns nothing from what it flagged."""

import json
import math

import numpy as np
import pytest

from megalm.config.guard import DetectorConfig
from megalm.guard.detect import Baseline, SpikeDetector, adapt_to_stride
from tests.guard.curves import healthy


def judge(curve, detector=None, first=0):
    detector = detector or SpikeDetector()
    return [detector.observe(first + step, float(loss)) for step, loss in enumerate(curve)]


def rollbacks(seen):
    return [o.step for o in seen if o.lasting]


def test_healthy_curves_give_no_lasting_alarm():
    for seed in range(4):
        seen = judge(healthy(5000, seed))
        assert rollbacks(seen) == []
        assert sum(o.kind == "transient" for o in seen) < 60


@pytest.mark.parametrize("rise, within", [(0.4, 14), (0.8, 12), (3.0, 12)])
def test_a_sustained_shift_is_found(rise, within):
    delays = []
    for seed in range(5):
        curve = healthy(1500, seed)
        curve[1000:] += rise
        found = [step for step in rollbacks(judge(curve)) if step >= 1000]
        assert found, seed
        delays.append(found[0] - 1000)
    assert np.median(delays) <= within


def test_a_small_shift_is_found_within_forty_steps():
    found = 0
    for seed in range(12):
        curve = healthy(1200, seed)
        curve[1000:] += 0.2
        found += any(1000 <= step <= 1040 for step in rollbacks(judge(curve)))
    assert found >= 10


@pytest.mark.parametrize("bump", [3 * np.exp(-np.arange(60) / 2), 3 * (np.arange(60) < 5), 8 * (np.arange(60) < 10)])
def test_a_transient_is_refused_and_never_rolled_back(bump):
    for seed in range(5):
        curve = healthy(1400, seed)
        curve[1000:1060] += bump
        seen = judge(curve)
        assert rollbacks(seen) == []
        assert seen[1000].kind == "transient"


def test_a_slow_rise_is_found_and_called_slow():
    curve = healthy(1500, 1)
    curve[1000:] += 0.01 * np.arange(500)
    shift = next(o for o in judge(curve) if o.lasting)
    assert 1000 <= shift.step < 1060 and shift.slow and shift.onset >= 985


def test_a_loss_that_falls_to_nothing_is_odd_but_a_better_loss_is_not():
    curve = healthy(1300, 2)
    curve[1000:1003] = 0.01
    seen = judge(curve)
    assert all(o.kind == "transient" for o in seen[1000:1003]) and rollbacks(seen) == []
    better = healthy(1300, 2)
    better[1000:] *= 0.75
    assert all(o.kind == "none" or o.z > 0 for o in judge(better)[1000:])


def stairs(heights, length, noise, seed):
    random = np.random.default_rng(seed)
    return np.concatenate([np.full(length, height) for height in heights]) * np.exp(
        random.normal(0, noise, len(heights) * length)
    )


def grokking(seed):
    random = np.random.default_rng(seed)
    curve = np.full(1200, 0.7)
    curve[600:630] = np.geomspace(0.7, 0.02, 30)
    curve[630:] = 0.02
    return curve * np.exp(random.normal(0, 0.05, len(curve)))


def reaching_zero(seed):
    curve = healthy(1300, seed)
    curve[1000:] = 0.0
    return curve


IMPROVEMENTS = {
    "stairs": lambda seed: stairs([1.2, 0.7, 0.3, 0.1, 0.03], 200, 0.08, seed),
    "another mixture": lambda seed: stairs([2.5, 1.1], 400, 0.03, seed),
    "a quiet stair": lambda seed: stairs([3.0, 0.2, 0.01], 300, 0.005, seed),
    "grokking": grokking,
    "zero for good": reaching_zero,
    "overfitting": lambda seed: np.concatenate([healthy(400, seed), 3.0 * np.exp(-np.arange(900) / 90)]) + 1e-4,
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", IMPROVEMENTS)
def test_a_loss_that_falls_for_good_is_never_rolled_back(name, seed):
    curve = IMPROVEMENTS[name](seed)
    seen = judge(curve)
    assert rollbacks(seen) == []
    flagged = [o for o in seen if o.kind != "none"]
    assert len(flagged) <= 11 * 5, "a few samples at each drop"
    assert all(o.z > 0 or o.why == ("fall",) for o in flagged)


def test_a_new_low_level_is_judged_by_as_the_old_one_was():
    curve = stairs([3.0, 0.6], 500, 0.02, 4)
    curve[900:] *= 1.6
    back = rollbacks(judge(curve))
    assert len(back) == 1 and 900 < back[0] < 930


def test_a_loss_that_goes_down_step_by_step_is_not_odd_at_any_step():
    assert all(o.kind == "none" for o in judge(grokking(5)))


def test_the_state_of_an_earlier_version_is_taken_up():
    detector = SpikeDetector()
    for step, value in enumerate(healthy(200, 3)):
        detector.observe(step, float(value))
    state = detector.state_dict()
    for name in ("fallen", "sudden", "previous"):
        del state[name]
    other = SpikeDetector()
    other.load_state_dict({**state, "below": 0, "lowest": None})
    assert other.observe(200, 3.0).z == detector.observe(200, 3.0).z


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_flagged_at_once_and_leaves_no_trace(bad):
    curve = healthy(1200, 3)
    clean = judge(curve)
    broken = curve.copy()
    broken[1000] = bad
    seen = judge(broken)
    assert seen[1000].kind == "nonfinite" and not seen[1000].lasting
    assert [o.kind for o in seen[1001:]] == [o.kind for o in clean[1001:]]
    assert seen[1001].z == pytest.approx(clean[1001].z, abs=0.2)


def test_non_finite_is_seen_from_the_first_step_and_four_in_a_row_last():
    seen = judge([10.0, math.nan, math.nan, math.nan, math.nan, math.nan])
    assert [o.kind for o in seen] == ["none"] + ["nonfinite"] * 5
    assert [o.lasting for o in seen] == [False, False, False, False, True, False]
    detector = SpikeDetector()
    assert detector.observe(1, 3.0, grad_norm=math.nan).kind == "nonfinite"
    assert detector.observe(2, 3.0, grad_norm=1.0, nonfinite=3).kind == "nonfinite"


def test_a_gradient_norm_out_of_line_is_refused():
    detector = SpikeDetector()
    random = np.random.default_rng(0)
    for step, loss in enumerate(healthy(200)):
        detector.observe(step, float(loss), grad_norm=float(np.exp(0.1 * random.standard_normal())))
    assert detector.observe(200, 3.3, grad_norm=100.0).kind == "transient"
    assert detector.observe(201, 3.3, grad_norm=1.0).kind == "none"


def test_flagged_values_do_not_move_the_baseline():
    curve = healthy(600, 5, outliers=0)
    spoiled = curve.copy()
    spoiled[500] = 50.0
    levels = []
    for values in (curve, spoiled):
        detector = SpikeDetector()
        judge(values[:510], detector)
        levels.append(detector.loss.predict(math.log(520)))
    assert levels[1][0] == pytest.approx(levels[0][0], abs=0.005)
    assert levels[1][2] == pytest.approx(levels[0][2], rel=0.1)


def test_a_new_level_is_taken_up_when_nobody_goes_back():
    curve = healthy(2000, 6)
    curve[1000:] += 1.0
    seen = judge(curve)
    assert len(rollbacks(seen)) == 1
    curve[1600:] += 1.0
    assert [step // 100 for step in rollbacks(judge(curve))] == [10, 16]


def test_the_old_level_that_comes_back_is_no_alarm():
    curve = healthy(1500, 6)
    curve[1000:1020] += 1.0
    assert len(rollbacks(judge(curve))) == 1


def test_state_goes_through_json_at_any_step():
    curve = healthy(700, 7)
    curve[450:] += 0.5
    whole = judge(curve)
    for cut in (3, 100, 449, 455, 461, 500):
        detector = SpikeDetector()
        judge(curve[:cut], detector)
        other = SpikeDetector()
        other.load_state_dict(json.loads(json.dumps(detector.state_dict())))
        assert judge(curve[cut:], other, first=cut) == whole[cut:], cut


def test_sparse_curves_alarm_after_three_samples():
    curve = healthy(600, 8, noise=0.01)[::1]
    curve[400:410] *= 2.0
    detector = SpikeDetector(adapt_to_stride(100))
    seen = [detector.observe(100 * i, float(x)) for i, x in enumerate(curve)]
    assert rollbacks(seen) == [40200]
    assert adapt_to_stride(1) == DetectorConfig()


def test_the_baseline_follows_a_falling_trend_and_no_rising_one():
    falling, rising = Baseline(64, 16, 0.004), Baseline(64, 16, 0.004)
    for step in range(64):
        falling.add(step, -0.01 * step)
        rising.add(step, 0.01 * step)
    assert falling.predict(64)[0] == pytest.approx(-0.58, abs=0.08)
    assert rising.predict(64)[0] == pytest.approx(0.315, abs=0.02)


def sizes(steps, update=0.3, spread=0.1, seed=0):
    random = np.random.default_rng(seed)
    noise = np.exp(0.15 * random.standard_normal((3, steps)))
    return [{"grad_norm": g, "update_size": update * u, "loss_spread": spread * s} for g, u, s in noise.T]


def judge_sizes(changes, steps=300):
    detector = SpikeDetector()
    given = sizes(steps)
    for step, change in changes.items():
        given[step] |= change
    return [detector.observe(i, float(x), **given[i]) for i, x in enumerate(healthy(steps, 4, outliers=0))]


def test_an_update_that_the_gradient_does_not_explain_is_seen_before_it_is_made():
    seen = judge_sizes({200: {"update_size": 3.0}, 201: {"update_size": 3.0}})
    assert [(o.kind, o.why, o.onset) for o in seen[200:202]] == [("update", ("update",), s) for s in (200, 201)]
    assert all(o.kind == "none" for o in seen[:200] + seen[202:])


def test_a_large_gradient_explains_a_large_update():
    (odd,) = [o for o in judge_sizes({200: {"update_size": 3.0, "grad_norm": 40.0}}) if o.kind != "none"]
    assert odd.kind == "transient" and odd.why == ("gradient",)


def test_a_data_rank_that_stands_out_is_odd_and_a_wide_spread_of_little_is_not():
    assert judge_sizes({200: {"loss_spread": 2.5}})[200].why == ("spread",)
    assert judge_sizes({200: {"loss_spread": 0.4}})[200].kind == "none"


def test_sizes_that_are_not_there_are_not_judged():
    assert (
        judge_sizes({i: {"update_size": None, "loss_spread": None, "grad_norm": None} for i in range(300)})[-1].kind
        == "none"
    )


def test_an_offending_level_that_is_left_out_is_not_taken_up():
    curve = healthy(1200, 3)
    curve[1000:] += 3.0
    detector = SpikeDetector()
    seen = []
    for step, loss in enumerate(curve):
        seen.append(detector.observe(step, float(loss)))
        if seen[-1].lasting:
            detector.keep_level(1000)
    assert sum(o.kind == "none" for o in seen[1000:]) < 5 and len(rollbacks(seen)) > 5
