import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.data import order
from megalm.ops import index
from megalm.parallel import initialize


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 2**20 + 1, 2**40 + 7])
def test_permute_is_the_defining_function(kernels, size):
    where = np.unique(np.linspace(0, size - 1, 300, dtype=np.int64))
    assert np.array_equal(index.permute(where, size, 12345), order.permute(where, size, 12345))
    keys = np.random.default_rng(0).integers(0, 2**63, len(where)).astype(np.uint64)
    assert np.array_equal(index.permute(where, size, keys), order.permute(where, size, keys))


def test_permute_is_a_permutation(kernels):
    assert sorted(index.permute(np.arange(777), 777, 2**64 - 1)) == list(range(777))


def test_fill_is_the_defining_function(kernels):
    key, scale, first, stride = 0xFEDCBA9876543210, 0.02 * initialize._SCALE, 2**40 + 3, 1001
    out = np.full((5, 333), np.nan, dtype=np.float32)
    index.fill(out, key, scale, first=first, stride=stride)
    rows, columns = np.arange(5, dtype=np.uint64)[:, None], np.arange(333, dtype=np.uint64)
    where = np.uint64(first) + rows * np.uint64(stride) + columns
    want = (initialize._centred(key, where.ravel()) * scale).astype(np.float32).reshape(5, 333)
    assert np.array_equal(out, want)


def test_bad_arguments_are_named(kernels):
    with pytest.raises(ConfigError, match="outside"):
        index.permute(np.array([5]), 5, 0)
    with pytest.raises(ConfigError, match="2 keys for 3"):
        index.permute(np.arange(3), 5, np.array([1, 2]))
    with pytest.raises(ConfigError, match="float64"):
        index.fill(np.zeros((2, 2)), 0, 1.0)
