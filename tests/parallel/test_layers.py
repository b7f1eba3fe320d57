"""Every layer on 2 and 4 ranks against the unsharded computation: values and gradients of inputs and of every global
tensor."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megalm.config import ConfigError, ParallelConfig
from megalm.parallel import collectives
from megalm.parallel.collectives import all_reduce, count_bytes
from megalm.parallel.embedding import VocabularyParallelEmbedding
from megalm.parallel.initialize import initialize
from megalm.parallel.linear import ColumnParallelLinear, Output, RowParallelLinear
from megalm.parallel.loss import vocabulary_parallel_cross_entropy
from megalm.parallel.mesh import Axis, Mesh, build_mesh
from megalm.parallel.norm import Norm
from megalm.parallel.slices import slice_of, view_piece
from tests.distributed import run_ranks

S, B, H = 8, 3, 12
ONE = Mesh.single()
ROW = ("row", "uneven row")


def make(kind, axis, sequence, dtype=torch.float32):
    common = dict(sequence_parallel=sequence, init_std=0.3, dtype=dtype)
    if kind == "qkv":  # 4 query heads and 2 key/value heads of 5: replicated on 4 ranks
        outputs = [Output("q", 20, 5), Output("k", 10, 5, True), Output("v", 10, 5, True)]
        layer = ColumnParallelLinear(H, outputs, axis, bias=True, **common)
    elif kind == "uneven qkv":  # 5 key/value heads of 2 with 2 query heads each: 3 and 2, or 2, 1, 1 and 1
        outputs = [Output(name, n, unit, uneven=True) for name, n, unit in (("q", 20, 4), ("k", 10, 2), ("v", 10, 2))]
        layer = ColumnParallelLinear(H, outputs, axis, bias=True, **common)
    elif kind == "uneven row":
        layer = RowParallelLinear(20, H, axis, name="down", unit=4, uneven=True, bias=True, **common)
    elif kind == "vocabulary":  # 13 rows: padded on 2 ranks to 7 each, on 4 to 4 each
        layer = ColumnParallelLinear(H, [Output("output", 13)], axis, bias=False, **common)
    elif kind == "row":
        layer = RowParallelLinear(20, H, axis, name="down", unit=5, bias=True, **common)
    elif kind == "embedding":
        layer = VocabularyParallelEmbedding(13, H, axis, name="embedding", **common)
    elif kind == "tiny embedding":  # 5 rows: on 4 ranks the last holds none
        layer = VocabularyParallelEmbedding(5, H, axis, name="embedding", **common)
    else:
        norm = dict(name="norm", eps=1e-5, axis=axis, sequence_parallel=sequence, dtype=dtype)
        layer = Norm(kind, H, bias=kind == "layernorm", **norm)
    initialize(layer, 11)
    with torch.no_grad():
        for parameter in layer.parameters():
            for piece in slice_of(parameter).pieces:
                if len(piece.shape) == 1:
                    values = torch.linspace(-1, 1, piece.global_shape[0])
                    rows = values[piece.offset[0] : piece.offset[0] + piece.shape[0]]
                    view_piece(parameter, piece).copy_(rows)
    return layer


def example(kind):
    generator = torch.Generator().manual_seed(3)
    if "embedding" in kind:
        vocabulary = 5 if kind.startswith("tiny") else 13
        return torch.randint(0, vocabulary, (S, B), generator=generator), torch.randn(S, B, H, generator=generator)
    width_in = 20 if kind in ROW else H
    width_out = {"qkv": 40, "uneven qkv": 40, "vocabulary": 13}.get(kind, H)
    return torch.randn(S, B, width_in, generator=generator), torch.randn(S, B, width_out, generator=generator)


def global_gradients(layer):
    """name -> list of (offset, gradient of the box), partial gradients summed as the slices say."""
    found = []
    for parameter in layer.parameters():
        for piece in slice_of(parameter).pieces:
            grad = view_piece(parameter.grad, piece).clone()
            for axis in piece.sum_over:
                all_reduce(grad, axis)
            found.append((piece.name, piece.offset, grad, piece.owner))
    return found


def output_columns(layer, axis):
    """Global columns of a column-parallel layer's local output; -1 for padding."""
    columns = torch.full((layer.weight.shape[0],), -1)
    start = {"q": 0, "k": 20, "v": 30, "output": 0}
    for piece in slice_of(layer.weight).pieces:
        first = start[piece.name.removesuffix(".weight")] + piece.offset[0]
        columns[piece.row : piece.row + piece.shape[0]] = torch.arange(first, first + piece.shape[0])
    return columns


def input_columns(layer):
    """Global columns of a row-parallel layer's local input."""
    (piece,) = slice_of(layer.weight).pieces
    return slice(piece.offset[1], piece.offset[1] + piece.shape[1])


def run_layer(size, kinds, dtype):
    axis = build_mesh(ParallelConfig(tensor=size)).tensor
    results = {}
    for kind in kinds:
        for sequence in (False, True):
            layer = make(kind, axis, sequence, dtype)
            x, grad = example(kind)
            columns = None
            if kind in ("qkv", "uneven qkv", "vocabulary"):
                columns = output_columns(layer, axis)
                # A replicated head's gradient is dealt out: each rank contributes a different part of it.
                share = torch.ones(columns.shape[0])
                for piece in slice_of(layer.weight).pieces:
                    part = (axis.rank % piece.replicas + 1) / sum(range(1, piece.replicas + 1))
                    share[piece.row : piece.row + piece.shape[0]] = part
                grad = grad[..., columns.clamp(min=0)] * share * columns.ge(0)
            if kind in ROW:
                x = x[..., input_columns(layer)]
            if sequence and kind not in ROW and "embedding" not in kind:
                x = x.chunk(size)[axis.rank]
            if sequence and columns is None:
                grad = grad.chunk(size)[axis.rank]
            x = x.to(dtype) if x.is_floating_point() else x
            x = x.contiguous().requires_grad_(x.is_floating_point())
            y = layer(x)
            y.backward(grad.to(dtype))
            inputs = input_columns(layer) if kind in ROW else None
            results[kind, sequence] = (y.detach(), x.grad, global_gradients(layer), columns, inputs)
    return results


KINDS = ["qkv", "uneven qkv", "vocabulary", "row", "uneven row", "embedding", "tiny embedding", "rmsnorm", "layernorm"]


def reference(kind):
    layer = make(kind, ONE.tensor, False)
    x, grad = example(kind)
    x.requires_grad_(x.is_floating_point())
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, {name: g for name, _, g, _ in global_gradients(layer)}


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (4, torch.float32), (2, torch.bfloat16)])
def test_layers_equal_the_unsharded_layer(size, dtype):
    # bf16: three roundings of up to 2^-8 relative each on sums of a dozen terms of size 1.
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.15)
    per_rank = run_ranks(size, run_layer, size, KINDS, dtype)
    for kind in KINDS:
        y, grad_x, grads = reference(kind)
        for sequence in (False, True):
            owned = {name: torch.zeros_like(g) for name, g in grads.items()}
            for rank, results in enumerate(per_rank):
                ours, ours_x, ours_grads, columns, inputs = results[kind, sequence]
                expected, expected_x = y, grad_x
                if columns is not None:
                    assert not ours[..., columns < 0].any()
                    ours, expected = ours[..., columns >= 0], y[..., columns[columns >= 0]]
                elif sequence:
                    expected = y.chunk(size)[rank]
                torch.testing.assert_close(ours.float(), expected, **close)
                if expected_x is not None:
                    if kind in ROW:
                        expected_x = expected_x[..., inputs]
                    elif sequence:
                        expected_x = expected_x.chunk(size)[rank]
                    torch.testing.assert_close(ours_x.float(), expected_x, **close)
                for name, offset, grad, owner in ours_grads:
                    window = tuple(slice(o, o + n) for o, n in zip(offset, grad.shape, strict=True))
                    torch.testing.assert_close(grad.float(), grads[name][window], **close)
                    if owner:
                        owned[name][window] += 1
            # Exactly one rank owns every element.
            assert all(count.eq(1).all() for count in owned.values()), (kind, sequence)


def test_a_single_rank_computes_what_torch_computes():
    column, row = make("qkv", ONE.tensor, False), make("row", ONE.tensor, False)
    x = torch.randn(S, B, H, requires_grad=True)
    torch.testing.assert_close(column(x), F.linear(x, column.weight, column.bias))
    z = torch.randn(S, B, 20)
    torch.testing.assert_close(row(z), F.linear(z, row.weight, row.bias))
    (column(x) ** 2).sum().backward()
    ours = [x.grad, column.weight.grad, column.bias.grad]
    x.grad = column.weight.grad = column.bias.grad = None
    (F.linear(x, column.weight, column.bias) ** 2).sum().backward()
    torch.testing.assert_close(ours, [x.grad, column.weight.grad, column.bias.grad])
    assert column.split_sizes == [20, 10, 10]


def test_norm_adds_the_residual():
    for kind in ("rmsnorm", "layernorm"):
        norm = make(kind, ONE.tensor, False)
        x, residual = torch.randn(S, B, H), torch.randn(S, B, H)
        y, total = norm(x, residual)
        torch.testing.assert_close(total, x + residual)
        torch.testing.assert_close(y, norm(x + residual))


# ------------------------------------------------------------------------------------------------------- cross-entropy
def losses(size, vocabulary, z_loss, dtype):
    axis = build_mesh(ParallelConfig(tensor=size)).tensor
    logits, labels, grad = loss_example(vocabulary)
    width = -(-vocabulary // size)
    padded = torch.full((S, B, width * size), 50.0)  # padding columns must not count, whatever they hold
    padded[..., :vocabulary] = logits
    local = padded.chunk(size, -1)[axis.rank].to(dtype).contiguous().requires_grad_()
    with count_bytes() as sent:
        loss = vocabulary_parallel_cross_entropy(local, labels, axis, vocab_size=vocabulary, z_loss=z_loss)
        loss.backward(grad)
    return loss.detach(), local.grad, sent.total


def loss_example(vocabulary):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(S, B, vocabulary, generator=generator) * 4
    labels = torch.randint(0, vocabulary, (S, B), generator=generator)
    labels[0, 0], labels[3, 1] = -100, vocabulary
    return logits, labels, torch.randn(S, B, generator=generator)


@pytest.mark.parametrize(("size", "vocabulary", "z_loss"), [(2, 13, 0.0), (4, 13, 0.01), (4, 5, 0.0)])
def test_cross_entropy(size, vocabulary, z_loss):
    logits, labels, grad = loss_example(vocabulary)
    logits = logits.double().requires_grad_()
    counted = (labels >= 0) & (labels < vocabulary)
    plain = F.cross_entropy(logits.permute(0, 2, 1), labels.masked_fill(~counted, 0), reduction="none")
    plain = (plain + z_loss * logits.logsumexp(-1) ** 2) * counted
    plain.backward(grad.double())
    for rank, (loss, ours, sent) in enumerate(run_ranks(size, losses, size, vocabulary, z_loss, torch.float32)):
        torch.testing.assert_close(loss.double(), plain.detach(), rtol=1e-6, atol=1e-5)
        expected = F.pad(logits.grad, (0, ours.shape[-1] * size - vocabulary)).chunk(size, -1)[rank]
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
        assert sent == 3 * S * B * 4 * 2 * (size - 1) / size  # one maximum, two sums, all-reduced; nothing in backward


def test_cross_entropy_of_bf16_logits():
    logits, labels, grad = loss_example(13)
    narrow = logits.to(torch.bfloat16).requires_grad_()
    exact = narrow.detach().float().requires_grad_()  # before backward writes over the logits
    loss = vocabulary_parallel_cross_entropy(narrow, labels, ONE.tensor, vocab_size=13)
    loss.backward(grad)
    counted = (labels >= 0) & (labels < 13)
    plain = F.cross_entropy(exact.permute(0, 2, 1), labels.masked_fill(~counted, 0), reduction="none") * counted
    plain.backward(grad)
    assert loss.dtype == torch.float32 and narrow.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(narrow.grad.float(), exact.grad, rtol=0.01, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- bytes
def block_bytes(size, sequence):
    axis = build_mesh(ParallelConfig(tensor=size)).tensor
    common = dict(sequence_parallel=sequence, init_std=0.1)
    up = ColumnParallelLinear(H, [Output("up", 16)], axis, bias=True, **common)
    down = RowParallelLinear(16, H, axis, name="down", bias=True, **common)
    initialize(nn.ModuleList([up, down]), 0)
    x = torch.randn(S // size if sequence else S, B, H, requires_grad=True)
    with count_bytes() as forward:
        y = down(F.relu(up(x)))
    with count_bytes() as backward:
        y.sum().backward()
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("size", [2, 4])
def test_a_tensor_parallel_block_moves_the_bytes_of_the_formulas(size):
    """Per rank, with b = S B H 4 bytes and n ranks: an all-reduce 2 b (n-1)/n, an all-gather or reduce-scatter b
    (n-1)/n."""
    part = S * B * H * 4 * (size - 1) / size
    forward, backward = run_ranks(size, block_bytes, size, False)[0]
    assert forward == backward == {("all_reduce", "tensor"): 2 * part}
    forward, backward = run_ranks(size, block_bytes, size, True)[0]
    assert forward == {("all_gather", "tensor"): part, ("reduce_scatter", "tensor"): part}
    # The column layer gathers its input again instead of keeping it.
    assert backward == {("all_gather", "tensor"): 2 * part, ("reduce_scatter", "tensor"): part}


# ------------------------------------------------------------------------------------------------------------- refusals
def test_what_does_not_divide_is_refused_with_numbers():
    axis = Axis("tensor", 4, 0, (0, 1, 2, 3))
    common = dict(sequence_parallel=False, init_std=0.1, bias=False)
    with pytest.raises(ConfigError, match="q: 6 units of 5 features do not divide over 4 tensor ranks"):
        ColumnParallelLinear(H, [Output("q", 30, 5)], axis, **common)
    with pytest.raises(ConfigError, match="nor do the ranks divide by them"):
        ColumnParallelLinear(H, [Output("k", 15, 5, True)], axis, **common)
    with pytest.raises(ConfigError, match="k: 3 units of 5 features do not divide over 4 tensor ranks"):
        ColumnParallelLinear(H, [Output("k", 15, 5, uneven=True)], axis, **common)  # a rank would have none
    with pytest.raises(ConfigError, match="not a whole number of units"):
        ColumnParallelLinear(H, [Output("q", 31, 5)], axis, **common)
    with pytest.raises(ConfigError, match="down: 18 input features"):
        RowParallelLinear(18, H, axis, name="down", **common)
    with pytest.raises(ConfigError, match="model.norm=batchnorm"):
        Norm("batchnorm", 3, name="n", eps=1e-5, axis=axis, sequence_parallel=False)


def overlap(size):
    """The order in which the column layer's backward starts and finishes things."""
    axis = build_mesh(ParallelConfig(tensor=size)).tensor
    log = []
    real = collectives.all_reduce_async

    def noted(*arguments):
        pending = real(*arguments)
        log.append("communication starts")
        wait = pending.wait
        pending.wait = lambda: (log.append("communication awaited"), wait())[1]
        return pending

    collectives.all_reduce_async = noted
    try:
        layer = make("qkv", axis, False)
        layer.weight.gradient_sink = Sink(layer.weight, log)
        layer(torch.randn(S, B, H, requires_grad=True)).sum().backward()
    finally:
        collectives.all_reduce_async = real
    return log


class Sink:
    active = True

    def __init__(self, weight, log):
        self.buffer, self.log = torch.zeros_like(weight), log

    def open(self):
        return self.buffer, True

    def close(self):
        self.log.append("weight gradient")


def test_the_weight_gradient_is_computed_while_the_input_gradient_travels():
    assert run_ranks(2, overlap, 2)[0] == ["communication starts", "weight gradient", "communication awaited"]
