import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.dropout import bias_dropout_add_reference, keep_mask
from tests.ops.accuracy import check_against_reference, leaf

SHAPES = [(1, 1), (3, 7), (2, 5, 33), (17, 64), (4, 1030)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", ["dropout", "residual", "bias_residual"])
def test_values_and_gradients(kernels, dtype, shape, parts):
    x = leaf(shape, dtype, kernels.device)
    residual = leaf(shape, dtype, kernels.device) if "residual" in parts else None
    bias = leaf(shape[-1:], dtype, kernels.device) if "bias" in parts else None

    def function(x, residual, bias):
        return ops.bias_dropout_add(x, residual, bias, p=0.3, seed=0xFEDCBA9876543210)

    check_against_reference(function, function, [x, residual, bias], [torch.randn(shape, device=kernels.device)])


def test_the_mask_is_the_defining_function(kernels, dtype):
    """Element by element; a zero would be a dropped one."""
    ids = torch.tensor([5, 2**40, 0, 7], device=kernels.device)
    x = torch.ones(4, 1030, dtype=dtype, device=kernels.device)
    y = ops.bias_dropout_add(x, p=0.5, seed=123, row_ids=ids, first_column=11)
    want = keep_mask(4, 1030, 0.5, 123, row_ids=ids, first_column=11, device=kernels.device)
    assert torch.equal(y != 0, want) and (y[want] == 2.0).all()


def test_one_known_element():
    """The hash, computed by hand with Python's integers: what other machines and versions must give."""
    low64 = (1 << 64) - 1
    state = (42 + 0x9E3779B97F4A7C15 * 4) & low64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & low64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & low64
    state ^= state >> 31
    kept = []
    for column in range(64):
        h = (state + column * 0x9E3779B1) & 0xFFFFFFFF
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        h = (((h ^ (h >> 15)) + (state >> 32)) * 0x846CA68B) & 0xFFFFFFFF
        kept.append(h ^ (h >> 16) >= 2**30)
    assert keep_mask(1, 64, 0.25, 42, row_ids=torch.tensor([3]))[0].tolist() == kept


def test_shards_have_the_whole_ones_mask(kernels):
    x = torch.randn(6, 40, device=kernels.device)
    whole = ops.bias_dropout_add(x, p=0.4, seed=9)
    ids = torch.arange(6, device=kernels.device)
    rows = [ops.bias_dropout_add(x[i : i + 2], p=0.4, seed=9, row_ids=ids[i : i + 2]) for i in (0, 2, 4)]
    columns = [ops.bias_dropout_add(x[:, i : i + 20], p=0.4, seed=9, first_column=i) for i in (0, 20)]
    assert torch.equal(torch.cat(rows), whole) and torch.equal(torch.cat(columns, 1), whole)


def test_masks_are_balanced_and_independent():
    """Rates over all, along rows and columns, and of neighbours, seeds and rows kept together: 5 sigma each."""
    rows, size, p = 512, 512, 0.1
    a, b = keep_mask(rows, size, p, 1).double(), keep_mask(rows, size, p, 2).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(a.mean() - (1 - p)) < 5 * sigma / (rows * size) ** 0.5
    for dim in (0, 1):
        assert (a.mean(dim) - (1 - p)).abs().max() < 5.5 * sigma / rows**0.5
    deviation = a - (1 - p)
    for other in (b - (1 - p), deviation.roll(1, 0), deviation.roll(1, 1), deviation.roll(16, 1)):
        assert abs((deviation * other).mean()) < 5 * sigma**2 / (rows * size) ** 0.5


def test_nothing_is_dropped_at_zero(kernels):
    x = torch.randn(3, 8, device=kernels.device)
    assert torch.equal(ops.bias_dropout_add(x, x, p=0.0, seed=1), x + x)


def test_reference_has_the_same_mask(kernels):
    x = torch.randn(5, 70, device=kernels.device)
    assert torch.equal(
        ops.bias_dropout_add(x, p=0.25, seed=3) == 0, bias_dropout_add_reference(x, None, None, 0.25, 3) == 0
    )


def test_bad_arguments_are_named(kernels):
    x = torch.ones(2, 4, device=kernels.device)
    with pytest.raises(ConfigError, match=r"p=1.0; it must be"):
        ops.bias_dropout_add(x, p=1.0, seed=0)
    with pytest.raises(ConfigError, match="residual has shape"):
        ops.bias_dropout_add(x, x[:1], p=0.1, seed=0)
    with pytest.raises(ConfigError, match="bias has shape"):
        ops.bias_dropout_add(x, bias=x[0, :3], p=0.1, seed=0)
    with pytest.raises(ConfigError, match="row_ids is torch.int32"):
        ops.bias_dropout_add(x, p=0.1, seed=0, row_ids=torch.zeros(2, dtype=torch.int32, device=kernels.device))
