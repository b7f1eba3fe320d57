import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.data import blend
from megalm.data.blend import NEAR, UNIT, Chairman, Tree, make_blend, round_shares


def mixtures(seed, count, most):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        number = int(rng.integers(2, most + 1))
        weights = rng.dirichlet(np.full(number, rng.choice([0.2, 1.0, 8.0]))) + 1e-4
        yield weights / weights.sum()


def errors(source, shares, start=0):
    """Of each prefix from the start of these slots: samples of each source less its exact share. -> [N + 1, n]"""
    counts = np.cumsum(source[:, None] == np.arange(len(shares)), axis=0)
    slots = np.arange(1, len(source) + 1)[:, None]
    return np.vstack([np.zeros(len(shares)), counts - slots * shares])


def test_every_prefix_and_every_window_is_as_exact_as_can_be():
    """Over random mixtures, of all windows of all sizes: prefixes within 1 - 1/(2n-2), windows within twice that."""
    for weights in mixtures(0, 150, 10):
        number = len(weights)
        error = errors(Chairman(weights).assign(np.arange(8000))[0], round_shares(weights) / UNIT)
        bound = 1 - 1 / (2 * number - 2) + 1e-9 * number
        assert np.abs(error).max() <= bound
        assert (error.max(axis=0) - error.min(axis=0)).max() <= 2 * bound


def test_two_sources_are_within_one_in_every_window():
    for share in np.linspace(0.001, 0.999, 60):
        error = errors(Chairman([share, 1 - share]).assign(np.arange(5000))[0], np.array([share, 1 - share]))
        assert (error.max(axis=0) - error.min(axis=0)).max() < 1.001


def test_equal_sources_take_turns():
    source, rank = Chairman([1.0] * 5).assign(np.arange(50))
    assert all(sorted(source[at : at + 5]) == [0, 1, 2, 3, 4] for at in range(0, 50, 5))
    assert np.array_equal(rank[source == 3], np.arange(10))


def test_any_position_is_found_without_those_before():
    for weights in mixtures(1, 60, 12):
        source, rank = Chairman(weights).assign(np.arange(3000))
        for at in (0, 1, 2, 17, 1234, 2999):
            fresh = Chairman(weights)
            assert np.array_equal(fresh.counts(at), np.bincount(source[:at], minlength=len(weights)))
            assert [int(v[0]) for v in fresh.assign(np.array([at]))] == [source[at], rank[at]]
        some = np.random.default_rng(2).integers(0, 3000, 40)
        got = Chairman(weights).assign(some)
        assert np.array_equal(got[0], source[some]) and np.array_equal(got[1], rank[some])


def test_far_positions_and_the_end_of_a_period():
    weights = [0.61, 0.3, 0.0, 0.09 - 3e-5, 3e-5]
    for base in (10**13 + 7, UNIT - 500, 5 * UNIT, 123_456_789):
        far = Chairman(weights)
        source, rank = far.assign(base + np.arange(1000))
        before, after = Chairman(weights).counts(base), Chairman(weights).counts(base + 1000)
        assert before.sum() == base and after.sum() - base == 1000
        for number in range(5):
            assert np.array_equal(rank[source == number], np.arange(before[number], after[number]))
        again = np.concatenate([base + np.arange(900, 1000), base + 3 * NEAR + np.arange(5), base + np.arange(10)])
        assert np.array_equal(far.assign(again)[0][:100], source[900:])
        assert np.array_equal(far.assign(again)[1][-10:], rank[:10])


def test_sources_below_a_millionth_are_dealt_apart():
    weights = np.array([0.5, 0.3, 0.2, 3e-7, 5e-8])
    weights /= weights.sum()
    mixture = Chairman(weights)
    for slots in (10**6, 10**8):
        assert np.abs(mixture.counts(slots) - weights * slots).max() < 1.5 + slots / UNIT
    base = int(0.9 / weights[3])
    length = 4 * 10**6
    source, rank = mixture.assign(base + np.arange(length))
    assert np.array_equal(np.bincount(source, minlength=5), mixture.counts(base + length) - mixture.counts(base))
    assert set(source) >= {0, 1, 2, 3}
    first = mixture.counts(base)[0]
    assert np.array_equal(rank[source == 0], first + np.arange((source == 0).sum()))


@pytest.mark.skipif(blend.load_library() is None, reason="the extension is not built")
def test_the_extension_and_python_agree(monkeypatch):
    cases = list(mixtures(3, 12, 8))
    native = [(Chairman(w).assign(777_000 + np.arange(400)), Chairman(w).counts(987_654_321)) for w in cases]
    monkeypatch.setattr(blend, "load_library", lambda: None)
    for weights, ((source, rank), counts) in zip(cases, native, strict=True):
        again = Chairman(weights).assign(777_000 + np.arange(400))
        assert np.array_equal(again[0], source) and np.array_equal(again[1], rank)
        assert np.array_equal(Chairman(weights).counts(987_654_321), counts)


def test_shares_are_whole_and_none_is_lost():
    for weights in (*mixtures(4, 50, 9), [1e-15, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1e-12]):
        shares = round_shares(weights)
        assert shares.sum() == UNIT and np.array_equal(shares > 0, np.asarray(weights) > 0)
        assert np.abs(shares - np.asarray(weights) / np.sum(weights) * UNIT).max() <= len(weights)


@pytest.mark.parametrize("number", [2, 3, 6, 20])
def test_the_tree_of_older_runs(number):
    """Two sources: every window within one sample. More: prefixes within 1.5, nearly all windows within one."""
    rng = np.random.default_rng(number)
    for _ in range(3):
        weights = rng.dirichlet(np.ones(number)) + 1e-3
        weights /= weights.sum()
        error = errors(Tree(weights).assign(np.arange(10_000))[0], weights)
        assert np.abs(error).max() < (0.51 if number == 2 else 1.5)
        assert np.array_equal(
            Tree(weights).counts(5000), np.bincount(Tree(weights).assign(np.arange(5000))[0], minlength=number)
        )


def test_what_is_no_mixture_is_refused():
    for weights in ([], [0.0], [-1.0, 2.0], [float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ConfigError, match="data.weights"):
            Chairman(weights)
    with pytest.raises(ConfigError, match="'coin'"):
        make_blend("coin", [1.0])
