import pytest
import torch

from megalm import ops


@pytest.mark.parametrize("sizes", [[], [1], [0, 5], [17, 16384, 16385], [40001]], ids=str)
def test_sum_of_squares_and_count(kernels, dtype, sizes):
    tensors = [torch.randn(size, device=kernels.device).to(dtype) for size in sizes]
    squares, bad = ops.l2_norm_nonfinite(tensors, kernels.device).tolist()
    assert bad == 0.0
    assert squares == pytest.approx(sum(float(t.double().square().sum()) for t in tensors), rel=1e-6)


def test_nonfinite_elements_are_counted(kernels, dtype):
    tensor = torch.ones(20000, device=kernels.device, dtype=dtype)
    tensor[[3, 17000]], tensor[19999] = torch.nan, -torch.inf
    squares, bad = ops.l2_norm_nonfinite([tensor, torch.ones(3, device=kernels.device, dtype=dtype)]).tolist()
    assert bad == 3.0 and squares != squares


def test_result_does_not_depend_on_the_number_of_threads(kernels):
    if kernels.place != "cpu":
        pytest.skip("about the CPU's threads")
    tensor, threads, results = torch.randn(200_001), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.l2_norm_nonfinite([tensor])[0].item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(results)) == 1
