"""NVIDIA's apex and Transformer Engine as further implementations of some ops, where they are installed.

Each vendor is a table from an op's name to a function with that op's own arguments. They are for CUDA tensors, are
optional everywhere, and only used when asked for (`ops.backend=apex` or `te`) or, with `auto`, where megalm._C has no
CUDA kernels. (NVIDIA's apex is built from github.com/NVIDIA/apex; the package of that name on PyPI is another project.)

Sources of the signatures: apex/normalization/fused_layer_norm.py, apex/optimizers/fused_adam.py;
transformer_engine/pytorch/ops/basic/rmsnorm.py, layer_norm.py, transformer_engine/pytorch/optimizers (version 2).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements that one block of a multi-tensor kernel takes: what both libraries' own optimizers pass.
_CHUNK = 2048 * 32


@dataclass
class Vendor:
    """One library's functions by op; `why` says why it cannot be used, None where it can."""

    name: str
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    why: str | None = None
    devices: tuple[str, ...] = ("cuda",)

    def serves(self, op: str, tensor: Tensor) -> bool:
        """Whether it has the op for tensors like this one."""
        return op in self.functions and tensor.device.type in self.devices and tensor.is_floating_point()


def load(name: str) -> Vendor:
    """Load the vendor `apex` or `te`; with `why` set where it is not installed or not what it should be."""
    try:
        return Vendor(name, {"apex": _apex, "te": _transformer_engine}[name]())
    except (ImportError, AttributeError, OSError) as error:
        return Vendor(name, why=_HOW_TO_INSTALL[name].format(error=error))


_HOW_TO_INSTALL = {
    "apex": "NVIDIA's apex with its CUDA extensions is not installed ({error}): build it from github.com/NVIDIA/apex (the "
    "package apex on PyPI is another project)",
    "te": "Transformer Engine is not installed ({error}): pip install transformer-engine[pytorch], on a machine with CUDA",
}


def _with_residual(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """From a norm the op that adds first."""

    def add_norm(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, *rest), h

    return add_norm


def _apex() -> dict[str, Callable[..., Any]]:
    importlib.import_module("fused_layer_norm_cuda")
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    kernels = importlib.import_module("amp_C")

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norms.fused_rms_norm_affine(x, weight, weight.shape, eps)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        bias = torch.zeros_like(weight) if bias is None else bias
        return norms.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)

    return _norms_and_lists(rms_norm, layer_norm, kernels.multi_tensor_adam, kernels.multi_tensor_l2norm)


def _transformer_engine() -> dict[str, Callable[..., Any]]:
    importlib.import_module("transformer_engine.pytorch")
    kernels = importlib.import_module("transformer_engine_torch")
    dtypes = importlib.import_module("transformer_engine.pytorch.constants").TE_DType

    class RMSNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
            rows = x.contiguous().view(-1, weight.shape[0])
            y, _, rstd = kernels.rmsnorm_fwd(rows, weight, eps, None, None, dtypes[x.dtype], 0, False)
            ctx.save_for_backward(rows, rstd, weight)
            return y.view(x.shape)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
            rows, rstd, weight = ctx.saved_tensors
            dx, dweight = kernels.rmsnorm_bwd(dy.contiguous().view(rows.shape), rows, rstd, weight, 0, False)
            return dx.view(dy.shape), dweight, None

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # type: ignore[override]
            rows = x.contiguous().view(-1, weight.shape[0])
            y, mean, rstd = kernels.layernorm_fwd(rows, weight, bias, eps, None, None, dtypes[x.dtype], 0, False)
            ctx.save_for_backward(rows, mean, rstd, weight)
            return y.view(x.shape)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
            rows, mean, rstd, weight = ctx.saved_tensors
            dx, dweight, dbias = kernels.layernorm_bwd(
                dy.contiguous().view(rows.shape), rows, mean, rstd, weight, 0, False
            )
            return dx.view(dy.shape), dweight, dbias, None

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return RMSNorm.apply(x, weight, eps)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return LayerNorm.apply(x, weight, torch.zeros_like(weight) if bias is None else bias, eps)

    return _norms_and_lists(rms_norm, layer_norm, kernels.multi_tensor_adam, kernels.multi_tensor_l2norm)


def _norms_and_lists(
    rms_norm: Callable[..., Tensor],
    layer_norm: Callable[..., Tensor],
    multi_tensor_adam: Callable[..., Any],
    multi_tensor_l2norm: Callable[..., Any],
) -> dict[str, Callable[..., Any]]:
    """The ops that both libraries offer, the multi-tensor ones with the same arguments."""

    def adamw_(
        master: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
        grad_scale: float | Tensor = 1.0,
        out: Tensor | None = None,
    ) -> None:
        scaled = grad if isinstance(grad_scale, float) and grad_scale == 1.0 else grad * grad_scale
        lists = [[scaled], [master], [exp_avg], [exp_avg_sq]]
        # Mode 1: decoupled decay; the next 1: bias correction.
        multi_tensor_adam(_CHUNK, _no_overflow(grad), lists, lr, beta1, beta2, eps, step, 1, 1, weight_decay)
        if out is not None:
            out.copy_(master)

    def l2_norm_nonfinite(tensors: list[Tensor]) -> Tensor:
        norm, _ = multi_tensor_l2norm(_CHUNK, _no_overflow(tensors[0]), [tensors], False)
        squares = norm.double().square().reshape(1)
        bad = torch.stack([torch.isfinite(t).logical_not_().sum() for t in tensors]).sum().double().reshape(1)
        return torch.cat((squares, bad))

    return {
        "rms_norm": rms_norm,
        "layer_norm": layer_norm,
        "add_rms_norm": _with_residual(rms_norm),
        "add_layer_norm": _with_residual(layer_norm),
        "adamw_": adamw_,
        "l2_norm_nonfinite": l2_norm_nonfinite,
    }


def _no_overflow(like: Tensor) -> Tensor:
    """The flag that multi-tensor kernels set where they meet an overflow, and that makes them stop."""
    return torch.zeros(1, dtype=torch.int32, device=like.device)
