"""The fixed product is exact, whatever computes it; and what is wrong with one element is seen."""

import pytest
import torch

from megalm.resilience.health import product
from megalm.resilience.health.product import hash_expected, hash_product, is_exact

CPU = torch.device("cpu")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cpu_that_works_gives_the_known_bits_with_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert is_exact(CPU)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_dtype_gives_the_same_bits(dtype):
    assert hash_product(CPU, dtype) == hash_expected()


def test_one_wrong_element_is_seen(monkeypatch):
    right = product._make_matrices()
    wrong = (right[0].clone(), right[1])
    wrong[0][17, 40] += 1
    expected = hash_expected()
    monkeypatch.setattr(product, "_make_matrices", lambda: wrong)
    assert hash_product(CPU, torch.float32) != expected
