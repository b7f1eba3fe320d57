import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from tests.ops.accuracy import check_against_reference, leaf

SHAPES = [(1, 1, 1, 1), (1, 2, 3, 3), (2, 3, 5, 17), (2, 2, 20, 33), (1, 2, 9, 64), (1, 1, 3, 300)]


def alibi_slopes(heads):
    return 2.0 ** -(torch.arange(1, heads + 1) * 8.0 / heads)


def documents(batch, keys, device):
    lengths = torch.rand(batch, keys, device=device) < 0.2
    return lengths.cumsum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "alibi", "documents", "alibi_documents"])
def test_values_and_gradients(kernels, dtype, shape, kind):
    scores = leaf(shape, dtype, kernels.device, scale=4.0)
    slopes = alibi_slopes(shape[1]).to(kernels.device) if "alibi" in kind else None
    starts = None
    if "documents" in kind:
        starts = ops.find_document_starts(documents(shape[0], shape[3], kernels.device))

    def function(scores):
        return ops.causal_softmax(scores, scale=0.3, slopes=slopes, starts=starts)

    got = check_against_reference(function, function, [scores], [torch.randn(shape, device=kernels.device)])
    assert (got[0].triu(shape[3] - shape[2] + 1) == 0).all()


def test_is_attention_with_alibi_within_documents(kernels):
    """Against torch's attention with the mask written out."""
    q, k, v = (torch.randn(2, 4, 24, 8, device=kernels.device) for _ in range(3))
    ids = documents(2, 24, kernels.device)
    slopes, positions = alibi_slopes(4).to(kernels.device), torch.arange(24, device=kernels.device)
    distance = positions[:, None] - positions
    mask = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)
    mask = mask.masked_fill((ids[:, None, :, None] != ids[:, None, None, :]), -torch.inf)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    weights = ops.causal_softmax(q @ k.mT, scale=8**-0.5, slopes=slopes, starts=ops.find_document_starts(ids))
    torch.testing.assert_close(weights @ v, want, rtol=1e-5, atol=1e-5)


def test_document_starts():
    ids = torch.tensor([[4, 4, 4, 7, 7, 1], [0, 0, 0, 0, 0, 0]])
    assert ops.find_document_starts(ids).tolist() == [[0, 0, 0, 3, 3, 5], [0, 0, 0, 0, 0, 0]]


def test_large_scores_and_infinities(kernels):
    scores = torch.tensor([[[[1e4, 5.0, 0.0], [3.0, -torch.inf, 9.0], [-1e4, -1e4, -1e4]]]], device=kernels.device)
    y = ops.causal_softmax(scores)
    want = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], device=kernels.device)
    torch.testing.assert_close(y[0, 0], want)


def test_bad_arguments_are_named(kernels):
    scores = torch.ones(1, 2, 3, 3, device=kernels.device)
    with pytest.raises(ConfigError, match="scores has shape"):
        ops.causal_softmax(torch.ones(1, 2, 4, 3))
    with pytest.raises(ConfigError, match="slopes is torch.float32"):
        ops.causal_softmax(scores, slopes=torch.ones(3, device=kernels.device))
    with pytest.raises(ConfigError, match="starts is torch.int64"):
        ops.causal_softmax(scores, starts=torch.zeros(1, 3, dtype=torch.int64, device=kernels.device))
