import hashlib

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.data.order import Source, derive_key, permute, resolve, sample_ids


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 100, 1023, 1025, 20_000])
def test_permutation_is_one(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, derive_key("k", size))), np.arange(size))


def test_permutation_needs_no_neighbours_and_depends_on_the_key():
    whole = permute(np.arange(5000), 5000, 7)
    assert np.array_equal(permute(np.array([17, 4999, 0]), 5000, 7), whole[[17, 4999, 0]])
    assert (whole == permute(np.arange(5000), 5000, 8)).sum() < 20
    assert permute(np.array([0, 10**14 - 1]), 10**14, 3).max() < 10**14


def test_permutation_is_even():
    """Where the first eighth of the indices lands: chi-square over 64 bins, and no correlation with the index."""
    size = 1 << 16
    image = permute(np.arange(size), size, 12345)
    bins = np.bincount(image[: size // 8] * 64 // size, minlength=64)
    assert ((bins - size / 512) ** 2 / (size / 512)).sum() < 110  # 63 degrees of freedom: p < 0.001 above 103
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02


def test_order_never_changes():
    """A saved run must find its samples again: these values are part of the format of a checkpoint."""
    sources = [Source("a", 1000, 0.7), Source("b", 10, 0.3)]
    for blend in ("chairman", "tree"):
        got = sample_ids(sources, 1234, np.arange(8), blend=blend)
        assert got.source.tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
        assert got.index.tolist() == [759, 4, 395, 340, 451, 9, 432, 761]
        assert got.epoch.tolist() == [0] * 8


def test_every_epoch_holds_every_sample_once_and_in_another_order():
    got = sample_ids([Source("a", 97, 1.0)], 5, np.arange(97 * 3))
    epochs = got.index.reshape(3, 97)
    assert all(np.array_equal(np.sort(epoch), np.arange(97)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(got.epoch, np.repeat([0, 1, 2], 97))


def test_a_new_source_leaves_the_order_of_the_others():
    alone = sample_ids([Source("a", 50, 1.0)], 1, np.arange(50)).index
    both = sample_ids([Source("a", 50, 0.5), Source("b", 50, 0.5)], 1, np.arange(100))
    assert np.array_equal(both.index[both.source == 0], alone)


@pytest.mark.parametrize(
    "sources, match",
    [
        ([Source("a", 5, 1.0), Source("a", 5, 1.0)], "twice"),
        ([Source("a", 0, 1.0)], "less than one sample"),
        ([Source("a", 5, -1.0)], "weights"),
        ([Source("a", 5, 0.0)], "weights"),
        ([Source("a", 5, float("nan"))], "weights"),
    ],
)
def test_bad_mixtures_are_explained(sources, match):
    with pytest.raises(ConfigError, match=match):
        sample_ids(sources, 1, np.arange(3))


@pytest.mark.parametrize("size", [96, 100, 7])
def test_a_window_keeps_neighbours_together_and_every_epoch_whole(size):
    source = [Source("a", size, 1.0)]
    ranks = np.arange(3 * size)
    got = resolve(source, 5, np.zeros_like(ranks), ranks, window=8)
    epochs = got.index.reshape(3, size)
    assert all(np.array_equal(np.sort(epoch), np.arange(size)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    if size > 8:
        stretches = epochs[0][: size // 8 * 8].reshape(-1, 8) // 8
        assert (stretches == stretches[:, :1]).all() and not (np.diff(stretches[:, 0]) == 1).all()
        orders = {tuple(part % 8) for part in epochs[0][: size // 8 * 8].reshape(-1, 8)}
        assert len(orders) > 8
    some = np.array([size + 3, 1, 2 * size])
    assert np.array_equal(resolve(source, 5, np.zeros_like(some), some, window=8).index, got.index[some])


def test_a_key_is_made_of_any_name_of_a_file():
    """Also of one whose bytes are no UTF-8; names that are UTF-8 keep the key that they had."""
    assert derive_key(1, "caf\udce9") != derive_key(1, "caf")
    text = "\0".join(("1", "日本"))
    assert derive_key(1, "日本") == int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
