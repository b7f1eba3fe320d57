import pytest
import torch
import torch.nn.functional as F

from megalm import ops
from megalm.config.errors import ConfigError
from tests.ops.accuracy import leaf

SHAPES = [(1, 1), (3, 7), (2, 3, 130), (5, 2049), (2, 5000)]


def plain(logits, labels, z_loss=0.0, smoothing=0.0):
    log_z = logits.logsumexp(-1)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=smoothing)
    return loss.view(labels.shape) + z_loss * log_z.square()


def close(got, want, dtype):
    torch.testing.assert_close(got.double(), want, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("z_loss,smoothing", [(0.0, 0.0), (1e-2, 0.1)])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_cross_entropy(kernels, dtype, shape, z_loss, smoothing, inplace):
    logits = leaf(shape, dtype, kernels.device, scale=4.0)
    labels = torch.randint(0, shape[-1], shape[:-1], device=kernels.device)
    gradient = torch.rand(shape[:-1], device=kernels.device)
    double = logits.detach().double().requires_grad_()
    want = plain(double, labels, z_loss, smoothing)
    (want_gradient,) = torch.autograd.grad(want, [double], gradient.double())
    source = logits * 1.0
    got = ops.cross_entropy(source, labels, z_loss=z_loss, label_smoothing=smoothing, inplace_backward=inplace)
    assert got.dtype == torch.float32
    (got_gradient,) = torch.autograd.grad(got, [logits], gradient)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    close(got_gradient, want_gradient, dtype)
    assert torch.equal(source.detach(), got_gradient) == inplace or shape == (1, 1)


def test_shards_of_the_vocabulary_join_to_the_whole(kernels, dtype):
    vocabulary, width, rows = 101, 40, 6  # the last of three shards has 19 columns of padding
    logits = leaf((rows, vocabulary), dtype, kernels.device, scale=5.0)
    labels = torch.tensor([0, 39, 40, 100, -100, 101], device=kernels.device)
    padded = F.pad(logits.detach(), (0, 3 * width - vocabulary), value=30.0)
    shards = [padded[:, i * width : (i + 1) * width].contiguous() for i in range(3)]
    own = [
        ops.cross_entropy_statistics(s, labels, first=i * width, columns=min(width, vocabulary - i * width))
        for i, s in enumerate(shards)
    ]
    top = torch.stack([o.peak for o in own]).amax(0)
    log_z = sum(o.total * (o.peak - top).exp() for o in own).log() + top
    target = sum(o.target for o in own)
    double = logits.detach().double().requires_grad_()
    counted = (labels >= 0) & (labels < vocabulary)
    want = torch.where(counted, plain(double, labels.clamp(0, vocabulary - 1)), 0.0)
    got = torch.where(counted, log_z - target, 0.0)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    weight = counted.float() * 0.5
    gradient = torch.cat(
        [
            ops.cross_entropy_gradient(
                s, labels, log_z, weight, weight, first=i * width, columns=min(width, vocabulary - i * width)
            )
            for i, s in enumerate(shards)
        ],
        dim=1,
    )
    (want_gradient,) = torch.autograd.grad(want.sum() * 0.5, [double])
    close(gradient[:, :vocabulary], want_gradient, dtype)
    assert torch.equal(gradient[:, vocabulary:], torch.zeros_like(gradient[:, vocabulary:]))


def test_a_rank_without_columns(kernels):
    labels = torch.tensor([1, 2], device=kernels.device)
    logits = torch.randn(2, 4, device=kernels.device)
    own = ops.cross_entropy_statistics(logits, labels, first=8, columns=0)
    assert own.peak.tolist() == [-torch.inf] * 2 and own.total.tolist() == [0.0, 0.0] == own.target.tolist()


def test_extreme_logits(kernels):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4], [-torch.inf, 2.0, 1.0]], device=kernels.device)
    labels = torch.tensor([0, 1, 2], device=kernels.device)
    loss = ops.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))


def test_labels_that_do_not_count(kernels):
    logits = leaf((3, 9), torch.float32, kernels.device)
    loss = ops.cross_entropy(logits, torch.tensor([-100, 2, 9], device=kernels.device))
    (gradient,) = torch.autograd.grad(loss.sum(), [logits])
    assert loss[0] == loss[2] == 0.0 and loss[1] > 0.0
    assert torch.equal(gradient[[0, 2]], torch.zeros(2, 9, device=kernels.device))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_linear_cross_entropy(kernels, chunk):
    hidden, weight = leaf((11, 16), torch.float32, kernels.device), leaf((37, 16), torch.float32, kernels.device)
    labels, mask = torch.randint(0, 37, (11,), device=kernels.device), torch.rand(11, device=kernels.device)
    got = ops.linear_cross_entropy(hidden, weight, labels, mask, chunk=chunk, z_loss=1e-3)
    want = (plain(hidden.double() @ weight.double().T, labels, z_loss=1e-3) * mask).sum()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got_gradients = torch.autograd.grad(got * 0.25, [hidden, weight])
    want_gradients = torch.autograd.grad(want * 0.25, [hidden, weight])
    torch.testing.assert_close(got_gradients, want_gradients, rtol=1e-4, atol=1e-5)


def test_linear_cross_entropy_has_one_backward(kernels):
    hidden, weight = leaf((3, 4), torch.float32, kernels.device), leaf((5, 4), torch.float32, kernels.device)
    loss = ops.linear_cross_entropy(hidden, weight, torch.zeros(3, dtype=torch.int64, device=kernels.device))
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="one backward pass"):
        loss.backward()


def test_bad_arguments_are_named(kernels):
    logits = torch.ones(2, 4)
    with pytest.raises(ConfigError, match="labels has shape"):
        ops.cross_entropy(logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="labels is torch.int32"):
        ops.cross_entropy(logits, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ConfigError, match="5 columns count"):
        ops.cross_entropy_statistics(logits, torch.zeros(2, dtype=torch.int64), columns=5)


def test_strided_arguments_of_the_gradient(kernels):
    """Copies of several strided arguments must all live until the kernel has read them."""
    logits = torch.randn(64, 50, device=kernels.device)
    numbers = torch.randn(3, 64, device=kernels.device)
    labels = torch.randint(0, 50, (64,), device=kernels.device)
    want = ops.cross_entropy_gradient(logits, labels, *numbers)
    pairs = torch.stack([labels, labels.flip(0)], 1)
    columns = numbers.t().contiguous()  # each argument a column: strided
    got = ops.cross_entropy_gradient(logits, pairs[:, 0], columns[:, 0], columns[:, 1], columns[:, 2])
    assert torch.equal(got, want)
