"""Products in 8-bit floats against their plain description, with faults planted in them that must show."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megalm import ops
from megalm.config import ConfigError
from megalm.config.precision import RECIPES as WORDS
from megalm.ops.quantize import WHOLE_ROW
from megalm.ops.scaled_mm import Scaled
from megalm.parallel.initialize import initialize
from megalm.parallel.linear import ColumnParallelLinear, Output, RowParallelLinear
from megalm.parallel.mesh import Axis, build_mesh
from megalm.parallel.slices import slice_of, view_piece
from megalm.precision import fp8, recipes
from megalm.precision.fp8 import Fp8Product, keep_weights
from megalm.precision.meter import Meter
from megalm.precision.policy import check_device
from megalm.precision.recipes import RECIPES, Operands, Scaling, find_largest
from tests.distributed import run_ranks
from tests.precision.plain import nearest, products

N, F_OUT, H = 160, 144, 288
ALONE = Axis("alone")


def example(dtype=torch.float32):
    """x [N, H], W [F, H], dy [N, F] with rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(5)
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((N, H), (F_OUT, H), (N, F_OUT)))
    x[:, ::37] *= 100
    x[::11] *= 0.01
    grad *= torch.randn(N, 1, generator=generator).mul(2).exp()
    return x.to(dtype), weight.to(dtype), (1e-3 * grad).to(dtype)


def compute(product, x, weight, grad):
    y, kept, _ = product.forward(x, weight, None)
    backward = product.backward(grad, kept)
    return y, backward.compute_input_gradient(weight), backward.compute_weight_gradient(x)


def check(recipe):
    """Values and gradients of one product, twice with other data, against the plain description."""
    product = Fp8Product(RECIPES[recipe], Meter("layers.0.mlp.up"))
    for factor in (1.0, 8.0):
        x, weight, grad = example()
        x, grad = factor * x, factor * grad
        for got, want in zip(compute(product, x, weight, grad), products(recipe, x, weight, grad), strict=True):
            # the sums are fp32's: they differ from exact ones by their terms' size
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("recipe", WORDS)
def test_the_three_products_are_those_of_the_plain_description(recipe):
    check(recipe)


# ------------------------------------------------------------------------------------------------------ planted faults
def invert(monkeypatch):
    quantize = Scaling.quantize
    monkeypatch.setattr(Scaling, "quantize", lambda *given: (q := quantize(*given))._replace(scale_inv=1 / q.scale_inv))


def block_the_other_way(monkeypatch):
    """Blocks of x and dy along features in the weight's gradient, too: quantised once for both products."""
    quantize = Scaling.quantize

    def wrong(self, x, largest):
        if x.is_contiguous() or self.block is None:
            return quantize(self, x, largest)
        there = quantize(self, x.t().contiguous(), largest).dequantize().t()
        return Scaled(there.to(torch.float8_e4m3fn), torch.ones(1), None)

    monkeypatch.setattr(Scaling, "quantize", wrong)


def use_the_scale_of_before(monkeypatch):
    before = [torch.tensor([1.0])]

    def stale(x, over=()):
        before.append(find_largest(x, over))
        return before[-4] if len(before) > 3 else before[-1]

    monkeypatch.setattr(fp8, "find_largest", stale)


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        *((recipe, invert) for recipe in WORDS),
        *((recipe, block_the_other_way) for recipe in ("rowwise", "blockwise", "mxfp8")),
        ("tensorwise", use_the_scale_of_before),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_fault_shows(recipe, fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(recipe)


def test_gradients_in_the_forward_format_show():
    """e4m3 for dy, whose smallest number is 2^-9 of 448, would zero what e5m2 keeps."""
    tensorwise = RECIPES["tensorwise"]
    x, weight, grad = example()
    grad = grad * torch.logspace(0, -6, N).unsqueeze(1)
    exact = grad.double() @ weight.double()

    def error(recipe):
        _, dx, _ = compute(Fp8Product(recipe, Meter("")), x, weight, grad)
        return float(((dx - exact).norm(dim=1) / exact.norm(dim=1)).max())

    narrow = replace(tensorwise, input_gradient=Operands(tensorwise.forward.a, tensorwise.forward.b))
    assert error(narrow) > 0.99 > 0.3 > error(RECIPES["rowwise"])
    halfway = len(grad) // 2
    for recipe, zeroed in ((tensorwise, False), (narrow, True)):
        how = recipe.input_gradient.a
        data = how.quantize(grad, find_largest(grad)).data.float()
        assert bool((data[halfway:] == 0).float().mean() > 0.2) == zeroed


@pytest.mark.parametrize("recipe", WORDS)
def test_what_is_kept_gives_the_same_bits(recipe):
    """x kept in 8 bits for backward, and weights quantised once for several passes."""
    x, weight, grad = example()
    plain = Fp8Product(RECIPES[recipe], Meter(""))
    wanted = compute(plain, x, weight, grad)
    product = plain.keeping()
    with keep_weights([product.weights]):
        for _ in range(2):
            y, kept, has_x = product.forward(x, weight, None, keep=True)
            assert has_x == (recipe != "rowwise_wide")
            backward = product.backward(grad, kept)
            dx = backward.compute_input_gradient(weight)
            dw, buffer = backward.compute_weight_gradient(None if has_x else x), torch.empty(weight.shape)
            backward.add_weight_gradient(buffer, None if has_x else x, empty=True)
            for got, want in zip((y, dx, dw, buffer), (*wanted, wanted[2]), strict=True):
                assert torch.equal(got, want)
        weight = 2 * weight  # not seen inside the block, whose weights do not change ...
        assert torch.equal(product.forward(x, weight, None).y, wanted[0])
    assert torch.equal(product.forward(x, weight, None).y, 2 * wanted[0])  # ... and seen behind it


# ------------------------------------------------------------------------------------------------------------- numbers
def test_every_code_is_the_nearest_one():
    values = torch.cat([torch.linspace(-500, 500, 4001), torch.linspace(-0.02, 0.02, 801)]).view(1, -1)
    values = torch.nn.functional.pad(values, (0, 14))
    got = ops.fp8_quantize(values, scale=torch.ones(1)).data.double()
    assert torch.equal(got, nearest(values.clamp(-448, 448), torch.float8_e4m3fn))


@pytest.mark.parametrize("recipe", WORDS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_a_value_that_is_not_finite_is_seen_though_the_cast_would_hide_it(recipe, value, operand):
    given = list(example())
    given[operand][3, 5] = value
    y, dx, dw = compute(Fp8Product(RECIPES[recipe], Meter("")), *given)
    spoilt = ((y, dw), (y, dx), (dx, dw))[operand]
    assert not any(bool(found.isfinite().all()) for found in spoilt)


def test_a_number_of_rows_that_no_device_serves_is_multiplied_as_it_is():
    x, weight, grad = example()
    x, grad = x[:5], grad[:5]
    for got, want in zip(
        compute(Fp8Product(RECIPES["rowwise"], Meter("")), x, weight, grad),
        (x @ weight.t(), grad @ weight, grad.t() @ x),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("recipe", WORDS)
def test_zeros_stay_zeros(recipe):
    zeros = torch.zeros(32, 32)
    assert not any(found.any() for found in compute(Fp8Product(RECIPES[recipe], Meter("")), zeros, zeros, zeros))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="this torch has no scaled_mm")
def test_the_emulated_product_is_torchs_within_rounding(recipe):
    x, weight, _ = example(torch.bfloat16)
    how = RECIPES[recipe].forward
    a, b = how.a.quantize(x, find_largest(x)), how.b.quantize(weight, find_largest(weight))
    kind = F.ScalingType.RowWise if a.block == WHOLE_ROW else F.ScalingType.TensorWise
    scale_b = b.scale_inv.t() if a.block == WHOLE_ROW else b.scale_inv
    torchs = F.scaled_mm(a.data, b.data.t(), a.scale_inv, kind, scale_b, kind, output_dtype=torch.bfloat16)
    ours = ops.scaled_mm(a, b, torch.bfloat16)
    torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=2e-6 * float(ours.abs().max()))


def test_matrices_that_do_not_fit_are_refused():
    square = Scaled(torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(1), None)
    wide = square._replace(data=torch.zeros(16, 32).to(torch.float8_e4m3fn))
    with pytest.raises(ConfigError, match=r"scaled_mm: a is \(16, 16\), b \(16, 32\)"):
        ops.scaled_mm(square, wide, torch.float32)


# --------------------------------------------------------------------------------------------------------------- ranks
S, B, WIDTH = 16, 4, 64


def make(kind, axis, sequence, recipe):
    common = dict(
        sequence_parallel=sequence, init_std=0.3, bias=False, product=Fp8Product(RECIPES[recipe], Meter("layers.0.it"))
    )
    if kind == "column":
        layer = ColumnParallelLinear(WIDTH, [Output("a", 96), Output("b", 32)], axis, **common)
    else:
        layer = RowParallelLinear(WIDTH, 96, axis, name="down", **common)
    initialize(layer, 11)
    with torch.no_grad():  # the largest weight lies in the first rank's part
        for parameter in layer.parameters():
            for piece in slice_of(parameter).pieces:
                if piece.offset == (0, 0) and piece.name in ("a.weight", "down.weight"):
                    view_piece(parameter, piece)[0, 0] = 7.0
    return layer


def run_layer(kind, sequence, recipe, forget=False):
    """(y, dx, dW by name) of this rank's part of a layer; the whole sequence is given, and this rank takes its own."""
    across = Fp8Product.across
    if forget:
        Fp8Product.across = lambda self, **_: self
    try:
        mesh = build_mesh(type("Sizes", (), dict(tensor=world(), pipeline=1, context=1, expert=1, expert_tensor=1)))
        axis, generator = mesh.tensor, torch.Generator().manual_seed(3)
        layer = make(kind, axis, sequence, recipe)
        x = torch.randn(S, B, WIDTH, generator=generator)
        x[:, :, 5] *= 30
        grad = torch.randn(S, B, 128 if kind == "column" else 96, generator=generator)
        grad[:, :, 3] *= 50
        if kind == "row":
            x = x.chunk(axis.size, -1)[axis.rank]
        elif sequence:
            x = x.chunk(axis.size)[axis.rank]
        x = x.contiguous().requires_grad_()
        y = layer(x)
        if kind == "column":
            grad = torch.cat([part.chunk(axis.size, -1)[axis.rank] for part in grad.split([96, 32], -1)], -1)
        elif sequence:
            grad = grad.chunk(axis.size)[axis.rank]
        y.backward(grad)
        pieces = {
            (piece.name, piece.offset): view_piece(parameter.grad, piece).clone()
            for parameter in layer.parameters()
            for piece in slice_of(parameter).pieces
        }
        return y.detach(), x.grad, pieces
    finally:
        Fp8Product.across = across


def world():
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def check_ranks(kind, sequence, recipe, forget=False):
    (alone,) = run_ranks(1, run_layer, kind, sequence, recipe)
    parts = run_ranks(2, run_layer, kind, sequence, recipe, forget)
    whole_y, whole_dx, whole_dw = alone
    ys, dxs = [part[0] for part in parts], [part[1] for part in parts]
    if kind == "column":
        y = torch.cat([torch.cat([each.split([48, 16], -1)[i] for each in ys], -1) for i in range(2)], -1)
        dx = torch.cat(dxs) if sequence else dxs[0]
    else:
        y, dx = torch.cat(ys) if sequence else ys[0], torch.cat(dxs, -1)
    torch.testing.assert_close(y, whole_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, whole_dx, rtol=1e-5, atol=1e-4)
    for part in parts:
        for (name, offset), gradient in part[2].items():
            whole = whole_dw[name, (0, 0)]
            box = tuple(slice(o, o + n) for o, n in zip(offset, gradient.shape, strict=True))
            torch.testing.assert_close(gradient, whole[box], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_tensor_scales_are_the_same_on_two_tensor_ranks(kind, sequence):
    check_ranks(kind, sequence, "tensorwise")


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_missing_reduction_over_tensor_ranks_shows(kind):
    with pytest.raises(AssertionError):
        check_ranks(kind, False, "tensorwise", True)


def test_a_value_that_is_not_finite_on_one_rank_is_seen_on_both():
    for largest in run_ranks(2, largest_of_both):
        assert not torch.isfinite(largest).any()


def largest_of_both():
    import torch.distributed as dist

    def reduce(values):
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    return find_largest(torch.tensor([torch.nan if dist.get_rank() else 2.0]), (reduce,))


@pytest.mark.parametrize(
    ("recipe", "capability", "said"),
    [
        ("tensorwise", (8, 0), "needs compute capability 8.9"),
        ("blockwise", (8, 9), "Here it can be tensorwise;"),
        ("mxfp8", (9, 0), "no product for it on GPUs yet"),
        ("rowwise", (9, 0), None),
    ],
)
def test_a_recipe_that_the_gpu_does_not_serve_is_refused(recipe, capability, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    check_device(recipe, torch.device("cpu"))
    with ops.use_backend("reference"):
        check_device(recipe, torch.device("cuda"))
    if said is None:
        return check_device(recipe, torch.device("cuda"))
    with pytest.raises(ConfigError, match=said):
        check_device(recipe, torch.device("cuda"))


def test_every_word_has_its_recipe():
    assert set(WORDS) == set(recipes.RECIPES)
