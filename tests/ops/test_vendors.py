"""apex and Transformer Engine behind the ops: against fakes with their published signatures, in plain torch.

Neither installs on a machine without CUDA; the fakes take exactly the arguments that the libraries do.
"""

import sys
from types import ModuleType

import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops import backend, vendors
from megalm.ops.adamw import adamw_reference_
from megalm.ops.backend import use_backend

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def module(monkeypatch, name, **members):
    made = ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    if "." in name:
        setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], made)
    return made


def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
):
    assert isinstance(chunk_size, int) and noop_flag.dtype == torch.int32 and not noop_flag.any()
    assert mode == 1 and bias_correction == 1
    for grad, parameter, exp_avg, exp_avg_sq in zip(*tensor_lists, strict=True):
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": epsilon, "weight_decay": weight_decay}
        adamw_reference_(parameter, grad, exp_avg, exp_avg_sq, step=step, **options)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor_python):
    assert isinstance(chunk_size, int) and noop_flag.dtype == torch.int32 and per_tensor_python is False
    (tensors,) = tensor_lists
    return torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt().view(1), torch.empty(0)


@pytest.fixture
def apex(monkeypatch):
    """apex.normalization.fused_layer_norm, fused_layer_norm_cuda and amp_C."""
    calls = []

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        calls.append("rms_norm")
        return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)

    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
        calls.append("layer_norm")
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)

    module(monkeypatch, "fused_layer_norm_cuda")
    module(monkeypatch, "apex")
    module(monkeypatch, "apex.normalization")
    norms = {"fused_rms_norm_affine": fused_rms_norm_affine, "fused_layer_norm_affine": fused_layer_norm_affine}
    module(monkeypatch, "apex.normalization.fused_layer_norm", **norms)
    module(monkeypatch, "amp_C", multi_tensor_adam=multi_tensor_adam, multi_tensor_l2norm=multi_tensor_l2norm)
    return calls


@pytest.fixture
def te(monkeypatch):
    """transformer_engine.pytorch and transformer_engine_torch of version 2."""
    calls = []

    def normed(kind, x, weight, bias, eps):
        calls.append(kind)
        assert x.dim() == 2 and x.is_contiguous()
        mean = x.float().mean(1) if kind == "layer_norm" else torch.zeros(len(x))
        centred = x.float() - mean[:, None]
        rstd = (centred.square().mean(1) + eps).rsqrt()
        y = centred * rstd[:, None] * weight + (0 if bias is None else bias)
        return y.to(x.dtype), mean, rstd

    def gradients(function, dz, x, *parameters):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, dz)

    def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
        assert (ln_out, quantizer, sm_margin, zero_centered_gamma) == (None, None, 0, False) and otype == "te-float32"
        y, _, rstd = normed("rms_norm", input, weight, None, eps)
        return y, None, rstd

    def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
        assert rsigma.shape == (len(x),)
        return gradients(lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5), dz, x, gamma)

    def layernorm_fwd(input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
        assert (ln_out, quantizer, sm_margin, zero_centered_gamma) == (None, None, 0, False)
        return normed("layer_norm", input, weight, bias, eps)

    def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma):
        assert mu.shape == rsigma.shape == (len(x),)
        function = torch.nn.functional.layer_norm
        zero = torch.zeros_like(gamma)
        return gradients(lambda x, w, b: function(x, w.shape, w, b, 1e-5), dz, x, gamma, zero)

    module(monkeypatch, "transformer_engine")
    module(monkeypatch, "transformer_engine.pytorch")
    module(monkeypatch, "transformer_engine.pytorch.constants", TE_DType={torch.float32: "te-float32"})
    functions = (rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd, multi_tensor_adam, multi_tensor_l2norm)
    module(monkeypatch, "transformer_engine_torch", **{f.__name__: f for f in functions})
    return calls


@pytest.fixture(params=["apex", "te"])
def vendor(request, monkeypatch):
    calls = request.getfixturevalue(request.param)
    load = vendors.load

    def on_cpu(name):
        found = load(name)
        found.devices = ("cpu",)
        return found

    monkeypatch.setattr(vendors, "load", on_cpu)
    return request.param, calls


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "layer_norm_bias", "add_rms_norm", "add_layer_norm"])
def test_norms(vendor, name):
    choice, calls = vendor
    x, residual, weight, bias = (torch.randn(s, requires_grad=True) for s in ((3, 2, 10), (3, 2, 10), (10,), (10,)))
    leaves = {
        "rms_norm": [x, weight],
        "layer_norm": [x, weight, None],
        "layer_norm_bias": [x, weight, bias],
        "add_rms_norm": [x, residual, weight],
        "add_layer_norm": [x, residual, weight, bias],
    }[name]
    function = getattr(ops, name.removesuffix("_bias"))
    results = []
    for backend_name in (choice, "reference"):
        with use_backend(backend_name):
            y = function(*leaves, 1e-5)
        total = sum((part * torch.arange(60.0).view(3, 2, 10)).sum() for part in (y if isinstance(y, tuple) else (y,)))
        results.append((total, *torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert calls and calls[0] in name


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_adamw(vendor, scale):
    got = [torch.randn(20), torch.randn(20), *torch.rand(2, 20)]
    want, out = [t.clone() for t in got], torch.empty(20, dtype=torch.bfloat16)
    gradient = got[1].clone()
    with use_backend(vendor[0]):
        ops.adamw_(*got, **OPTIONS, step=2, grad_scale=scale, out=out)
    adamw_reference_(*want, **OPTIONS, step=2, grad_scale=scale)
    torch.testing.assert_close(got, want)
    assert torch.equal(out, got[0].bfloat16()) and torch.equal(got[1], gradient)


def test_adamw_with_a_skip_flag_is_not_theirs(vendor, monkeypatch):
    monkeypatch.setattr(vendors, "_no_overflow", None)  # would be called by theirs
    tensors = [torch.randn(20), torch.randn(20), *torch.rand(2, 20)]
    before = tensors[0].clone()
    with use_backend(vendor[0]):
        ops.adamw_(*tensors, **OPTIONS, step=1, skip=torch.ones(1))
    assert torch.equal(tensors[0], before)


def test_l2_norm(vendor):
    tensors = [torch.randn(30), torch.randn(4, 5)]
    with use_backend(vendor[0]):
        squares, bad = ops.l2_norm_nonfinite(tensors).tolist()
        assert bad == 0.0 and squares == pytest.approx(sum(float(t.square().sum()) for t in tensors), rel=1e-5)
        tensors[0][3] = torch.nan
        assert ops.l2_norm_nonfinite(tensors)[1] == 1.0


def test_ops_that_they_lack_are_served_as_usual(vendor):
    x = torch.randn(3, 8)
    with use_backend(vendor[0]):
        torch.testing.assert_close(ops.swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])


def test_without_them_the_message_says_what_to_do(monkeypatch):
    for name in ("apex", "fused_layer_norm_cuda", "transformer_engine"):
        monkeypatch.setitem(sys.modules, name, None)  # import fails
    with pytest.raises(ConfigError, match="package apex on PyPI is another project"):
        ops.set_backend("apex")
    with pytest.raises(ConfigError, match=r"transformer-engine\[pytorch\]"):
        ops.set_backend("te")


def test_the_other_apex_is_not_taken(monkeypatch):
    """PyPI's package has neither the CUDA modules nor apex.normalization."""
    module(monkeypatch, "apex")
    assert vendors.load("apex").why is not None
    assert backend.find_vendor("rms_norm", torch.ones(1)) is None
