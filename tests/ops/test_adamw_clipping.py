"""AdamW with a learning rate for each tensor of the buffer, and what update clipping makes it from."""

import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.adamw import adamw_reference_, update_squares_reference

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
LENGTHS = [[1], [5, 0, 7, 3], [1, 1030, 2, 64], [20000, 16384, 3]]


def state(size, device):
    return [torch.randn(size, device=device), torch.randn(size, device=device), *torch.rand(2, size, device=device)]


def segments(lengths, device):
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return ops.Segments(ends, torch.rand(len(lengths), device=device) + 0.1)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16], ids=str)
def test_each_tensor_has_its_rate(kernels, lengths, out_dtype):
    got, cut = state(sum(lengths), kernels.device), segments(lengths, kernels.device)
    out = None if out_dtype is None else torch.empty(sum(lengths), dtype=out_dtype, device=kernels.device)
    alone = [t.clone() for t in got]
    ops.adamw_(*got, **OPTIONS, step=2, out=out, segments=cut)
    for *tensors, rate in zip(*(t.split(lengths) for t in alone), cut.rates.tolist(), strict=True):
        ops.adamw_(*tensors, **{**OPTIONS, "lr": OPTIONS["lr"] * rate}, step=2)
    for a, b in zip(got, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if out is not None:
        assert torch.equal(out, got[0].to(out_dtype))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sums_of_each_tensor(kernels, lengths):
    _, grad, _, average = state(sum(lengths), kernels.device)
    average *= 1e-3
    got = ops.update_squares(grad, average, lengths, beta2=0.95, eps=1e-8, step=3, grad_scale=0.5)
    want = update_squares_reference(grad.double(), average.double(), lengths, 0.95, 1e-8, 3, 0.5)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_clips_as_the_paper_says(kernels):
    """One tensor whose gradients have grown tenfold, one whose have not (Wortsman et al. 2023, algorithm 2)."""
    lengths, counts = [100, 50], torch.tensor([100, 50], device=kernels.device)
    master, grad, first, second = state(150, kernels.device)
    second[:] = 1.0 - 0.95**4  # root mean square 1 so far, bias included
    grad[:100] *= 10.0
    step = {"beta2": 0.95, "eps": 1e-8, "step": 5}
    rates = ops.update_clipping_rates(ops.update_squares(grad, second, lengths, **step), counts)
    truth = (second * 0.95 + 0.05 * grad.square()) / (1 - 0.95**5)
    rms = [(part.square() / u).mean().sqrt() for part, u in zip(grad.split(lengths), truth.split(lengths), strict=True)]
    assert rms[0] > 1.5
    want = torch.stack([1 / max(torch.ones_like(r), r) for r in rms])
    torch.testing.assert_close(rates, want, rtol=1e-5, atol=1e-6)
    clipped = ops.Segments(counts.cumsum(0), rates)
    before = master.clone()
    expected = [t.double() for t in (master, grad, first, second)]
    adamw_reference_(*expected, **OPTIONS, step=5, segments=clipped)
    ops.adamw_(master, grad, first, second, **OPTIONS, step=5, segments=clipped)
    torch.testing.assert_close(master.double(), expected[0], rtol=2e-6, atol=2e-6)
    assert not torch.equal(master, before)


def test_sum_does_not_depend_on_the_number_of_threads(kernels):
    if kernels.place != "cpu":
        pytest.skip("about the CPU's threads")
    _, grad, _, average = state(100_000, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.update_squares(grad, average, [70_000, 30_000], beta2=0.9, eps=1e-8, step=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bad_arguments_are_named(kernels):
    tensors = state(4, kernels.device)
    ends = torch.tensor([4], device=kernels.device)
    with pytest.raises(ConfigError, match=r"segments.rates is torch.float64"):
        ops.adamw_(*tensors, **OPTIONS, step=1, segments=ops.Segments(ends, ends.double()))
    with pytest.raises(ConfigError, match=r"segments.ends is torch.int32"):
        ops.adamw_(*tensors, **OPTIONS, step=1, segments=ops.Segments(ends.int(), ends.float()))
    with pytest.raises(ConfigError, match="lengths add up to 3"):
        ops.update_squares(tensors[1], tensors[3], [3], beta2=0.9, eps=1e-8, step=1)
