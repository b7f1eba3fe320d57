import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.backend import use_backend
from megalm.ops.quantize import fp8_scale
from tests.ops.accuracy import leaf

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]
BLOCKS = [None, (1, 128), (128, 128)]
SHAPES = [(1, 1), (3, 7), (16, 128), (130, 260), (257, 129), (5, 384)]

formats = pytest.mark.parametrize("fp8", FORMATS, ids=["e4m3fn", "e5m2"])
blocks = pytest.mark.parametrize("block", BLOCKS, ids=["tensor", "row", "tile"])


def same(got, want):
    """Bit by bit; NaNs are NaNs whatever their sign and payload."""
    assert got.shape == want.shape and got.dtype == want.dtype
    a, b = got.contiguous(), want.contiguous()
    nan = b.float().isnan()
    assert torch.equal(a.float().isnan(), nan)
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    assert torch.equal(a.view(word)[~nan], b.view(word)[~nan])


def both(function):
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            results.append(function())
    return results


def every_number(device):
    """Numbers that meet each rounding: all bf16 values, and the midpoints of the 8-bit formats with their neighbours."""
    bf16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    near = []
    for fp8 in FORMATS:
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(fp8).float()
        finite = codes[codes.isfinite()].sort()[0]
        middle = (finite[1:] + finite[:-1]) / 2
        near += [finite, middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))]
    return torch.cat([bf16, *near]).to(device)


@formats
def test_conversion_is_torchs(kernels, fp8):
    x = every_number(kernels.device)
    one = torch.ones(1, device=kernels.device)
    if kernels.small:
        x = torch.cat([x[::37], x[65536:]])
    x = x[: len(x) // 8 * 8].view(8, -1)
    got = ops.fp8_quantize(x, fp8, scale=one)
    largest = torch.finfo(fp8).max
    same(got.data, x.clamp(-largest, largest).to(fp8))
    same(got.amax, torch.full((1,), torch.nan, device=kernels.device))


@formats
def test_back_is_torchs(kernels, fp8):
    codes = torch.arange(256, dtype=torch.int32, device=kernels.device).to(torch.uint8).view(fp8).view(1, 256)
    for factor in (1.0, 0.37):
        scale_inv = torch.full((1,), factor, device=kernels.device)
        for dtype in (torch.float32, torch.bfloat16):
            same(ops.fp8_dequantize(codes, scale_inv, dtype=dtype), (codes.float() * factor).to(dtype))


@formats
@blocks
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_and_back(kernels, dtype, fp8, block, shape):
    x = (
        leaf(shape, dtype, kernels.device).detach().float() * 10 ** torch.randn(shape[0], 1, device=kernels.device)
    ).to(dtype)
    x[0, 0] = 0
    for power_of_two in (False, True):
        options = {"block": block, "power_of_two": power_of_two, "transpose": True}
        got, want = both(lambda options=options: ops.fp8_quantize(x, fp8, **options))
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                same(a, b)
        plain = ops.fp8_quantize(x, fp8, block=block, power_of_two=power_of_two)
        same(plain.data, want.data)
        assert plain.data_t is None and plain.scale_inv_t is None
        back, wanted = both(lambda q=want: ops.fp8_dequantize(q.data, q.scale_inv, block=block, dtype=dtype))
        same(back, wanted)
        turned = ops.fp8_dequantize(got.data_t, got.scale_inv_t.contiguous(), block=block, dtype=dtype)
        # Half a step of the format at a block's largest value bounds the error.
        step = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}[fp8]
        for result in (back, turned.t()):
            error = (result.float() - x.float()).abs()
            assert (error <= 2.1 * step * x.float().abs() + 1e-2 * x.float().abs().max() * step).all()
        if power_of_two:
            assert (got.scale_inv.log2() == got.scale_inv.log2().round()).all()


@blocks
def test_values_that_are_not_finite_and_zeros(kernels, block):
    x = torch.randn(130, 140, device=kernels.device)
    x[0, 0], x[1, 1], x[129, 139], x[5] = torch.nan, torch.inf, -torch.inf, 0
    for fp8 in FORMATS:
        got, want = both(lambda fp8=fp8: ops.fp8_quantize(x, fp8, block=block, transpose=True))
        for a, b in zip(got, want, strict=True):
            if a is not None:
                same(a, b)
        largest = torch.finfo(fp8).max
        assert got.data[0, 0].float().isnan() and got.data[1, 1].float() == largest
        assert got.data[129, 139].float() == -largest and not got.data[5].float().any()
        assert got.scale_inv.isfinite().all()


@blocks
def test_tiny_values_do_not_overflow_the_scale(kernels, block):
    x = torch.full((3, 5), 1e-44, device=kernels.device)
    got, want = both(lambda: ops.fp8_quantize(x, block=block))
    same(got.data, want.data)
    same(got.scale_inv, want.scale_inv)
    assert got.scale_inv.isfinite().all() and (got.scale_inv > 0).all()


def test_given_scale_and_amax(kernels):
    x = torch.randn(64, 40, device=kernels.device)
    scale = torch.tensor([100.0], device=kernels.device)
    got = ops.fp8_quantize(x, scale=scale, transpose=True)
    assert got.amax == x.abs().max() and got.scale_inv == 1 / scale
    same(got.data, (x * 100).clamp(-448, 448).to(torch.float8_e4m3fn))
    same(got.data_t, got.data.t())


def test_delayed_scale():
    delayed = ops.DelayedScale(torch.float8_e4m3fn, length=3)
    assert delayed.scale.item() == 1.0
    seen = []
    for value in (4.0, 2.0, float("inf"), 1.0, 1.0):
        delayed.record(torch.tensor([value]))
        seen.append(delayed.scale.item())
    assert seen == [112.0, 112.0, 112.0, 224.0, 448.0]
    roomy = ops.DelayedScale(torch.float8_e5m2, margin=1)
    roomy.record(torch.tensor([7.0]))
    assert roomy.scale.item() == 4096.0


def test_scale_of_nothing():
    odd = torch.tensor([0.0, torch.inf, torch.nan, 1e-40])
    assert fp8_scale(odd, torch.float8_e4m3fn).tolist() == [1.0, 1.0, 1.0, 2.0**126]
    assert fp8_scale(torch.tensor([3.0]), torch.float8_e4m3fn, True).item() == 128.0


@blocks
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_empty(kernels, block, shape):
    x = torch.zeros(shape, device=kernels.device)
    got, want = both(lambda: ops.fp8_quantize(x, block=block, transpose=True))
    for a, b in zip(got, want, strict=True):
        if a is not None:
            same(a, b)
    assert ops.fp8_dequantize(got.data, got.scale_inv, block=block).shape == shape


def test_bad_arguments_are_named(kernels):
    x = torch.zeros(4, 8)
    data, scale_inv, *_ = ops.fp8_quantize(x)
    for call, message in [
        (lambda: ops.fp8_quantize(x[0]), "x has shape"),
        (lambda: ops.fp8_quantize(x, torch.int8), "dtype is torch.int8"),
        (lambda: ops.fp8_quantize(x, block=(1, 64)), "block="),
        (lambda: ops.fp8_quantize(x, scale=torch.ones(2)), "scale is"),
        (lambda: ops.fp8_quantize(x, scale=torch.ones(1), block=(1, 128)), "scale is for the whole"),
        (lambda: ops.fp8_quantize(x.double()), "x is torch.float64"),
        (lambda: ops.fp8_dequantize(data[0], scale_inv), "data has shape"),
        (lambda: ops.fp8_dequantize(x, scale_inv), "data is torch.float32"),
        (lambda: ops.fp8_dequantize(data, scale_inv, block=(1, 128)), "scale_inv is"),
        (lambda: ops.DelayedScale(torch.float8_e4m3fn, length=0), "length=0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()
