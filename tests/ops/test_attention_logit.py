import math

import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.attention_logit import largest_logits_reference_

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # products of what was rounded, in fp32


def exact(q, k, scale, mask=None):
    """fp64, from all logits, at the queries that are looked at."""
    length, _, heads, _ = q.shape
    q, k = q.double(), k.double().repeat_interleave(heads // k.shape[2], 2)
    logits = torch.einsum("sbhd,tbhd->bhst", q, k) * scale
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    logits = logits.masked_fill(~(seen if mask is None else seen & mask), -torch.inf)
    return logits[:, :, torch.arange(length - 1, -1, -max(1, length // 8))].amax(dim=(0, 2, 3)).float()


def start(heads, device):
    return torch.full((heads,), -math.inf, device=device)


SHAPES = [(32, 3, 4, 2, 8), (5, 1, 2, 2, 4), (15, 2, 6, 1, 20), (1, 1, 3, 1, 7), (100, 2, 3, 3, 16), (600, 1, 4, 1, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_exact_on_the_queries_that_are_looked_at(kernels, dtype, shape, documents):
    length, batch, heads, groups, size = shape
    q = torch.randn(length, batch, heads, size, device=kernels.device).to(dtype)
    k = torch.randn(length, batch, groups, size, device=kernels.device).to(dtype)
    mask = None
    if documents:
        ids = torch.randint(3, (batch, length), device=kernels.device).sort().values
        mask = ids[:, None, :, None] == ids[:, None, None, :]
    found = ops.largest_logits_(start(heads, kernels.device), q, k, 0.3, mask)
    torch.testing.assert_close(found, exact(q, k, 0.3, mask), rtol=TOLERANCE[dtype], atol=1e-5)


def test_negative_logits_and_what_was_there_before(kernels):
    q, k = torch.ones(9, 1, 3, 4, device=kernels.device), -torch.ones(9, 1, 1, 4, device=kernels.device)
    largest = torch.tensor([-math.inf, -3.0, 5.0], device=kernels.device)
    ops.largest_logits_(largest, q, k, 1.0)
    assert largest.tolist() == [-4.0, -3.0, 5.0]
    ops.largest_logits_(largest, q, -k, 1.0)
    assert largest.tolist() == [4.0, 4.0, 5.0]


def test_nan_stays_and_touches_its_head_only(kernels):
    q, k = torch.randn(20, 2, 4, 8, device=kernels.device), torch.randn(20, 2, 2, 8, device=kernels.device)
    k[3, 1, 1, 5] = math.nan
    found = ops.largest_logits_(start(4, kernels.device), q, k, 1.0)
    assert found.isnan().tolist() == [False, False, True, True]
    k[3, 1, 1, 5] = 0.0
    found = ops.largest_logits_(found, q, k, 1.0)
    assert found.isnan().tolist() == [False, False, True, True]
    assert torch.equal(ops.largest_logits_(start(4, kernels.device), q, k, 1.0).isnan(), torch.zeros_like(found).bool())


def test_a_key_after_every_query_that_sees_it_does_not_count(kernels):
    q, k = torch.ones(16, 1, 1, 8, device=kernels.device), torch.ones(16, 1, 1, 8, device=kernels.device)
    q[-1] = 0.0  # the last query is the only one to see the last key
    k[-1] = 100.0
    assert ops.largest_logits_(start(1, kernels.device), q, k, 1.0).item() == 8.0


@pytest.mark.parametrize("width", [8, 300])
def test_views_of_a_stack_and_heads_too_long_for_the_kernel(kernels, width):
    stack = torch.randn(17, 2, 4 * width, device=kernels.device)
    q, k = (
        stack[..., : 2 * width].unflatten(-1, (2, width)),
        stack[..., 2 * width : 3 * width].unflatten(-1, (1, width)),
    )
    found = ops.largest_logits_(start(2, kernels.device), q, k, 0.1)
    torch.testing.assert_close(found, exact(q, k, 0.1), rtol=1e-5, atol=1e-5)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(ops.largest_logits_(start(2, kernels.device), turned, k, 0.1), found)


@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_agrees(kernels, masked):
    q, k = torch.randn(33, 2, 4, 8), torch.randn(33, 2, 2, 8)
    mask = torch.rand(33, 33) < 0.5 if masked else None
    plain = start(4, "cpu")
    largest_logits_reference_(plain, q, k, 0.3, mask)
    torch.testing.assert_close(plain, exact(q, k, 0.3, mask), rtol=1e-5, atol=1e-5)
    on = [t if t is None else t.to(kernels.device) for t in (q, k, mask)]
    found = ops.largest_logits_(start(4, kernels.device), on[0], on[1], 0.3, on[2])
    torch.testing.assert_close(found.cpu(), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": torch.ones(4, 1, 3, 8)}, "heads a multiple"),
        ({"k": torch.ones(5, 1, 1, 8)}, "k "),
        ({"largest": torch.ones(3)}, "largest is"),
        ({"largest": torch.ones(2, dtype=torch.float64)}, "largest is"),
        ({"mask": torch.ones(4, 4)}, "mask is"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, "mask is"),
    ],
)
def test_bad_input_is_named(change, named):
    arguments = {
        "largest": torch.ones(2),
        "q": torch.ones(4, 1, 2, 8),
        "k": torch.ones(4, 1, 1, 8),
        "scale": 1.0,
        "mask": None,
    }
    with pytest.raises((ConfigError, ValueError), match=named):
        ops.largest_logits_(**{**arguments, **change})


def test_nothing_to_look_at():
    assert (
        ops.largest_logits_(start(2, "cpu"), torch.ones(0, 1, 2, 8), torch.ones(0, 1, 1, 8), 1.0).tolist()
        == [-math.inf] * 2
    )
