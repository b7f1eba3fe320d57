"""One native op with its gradient, for eager code and for torch.compile.

Eager code takes the short way: an autograd.Function, or the bare function where no gradient is wanted. Under
torch.compile the same functions go in as torch.library custom ops with fake implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Outputs = Any


class CustomOp:
    """forward(*inputs) -> outputs with gradients(backward, context, *output gradients) -> input gradients.

    forward, backward: the native functions, with the annotations that torch.library reads its schema from; neither
        returns one of its arguments, and only what `mutates` names is written to.
    save(context, inputs, outputs): keeps what gradients needs.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., Outputs],
        forward_fake: Callable[..., Outputs],
        backward: Callable[..., Outputs],
        backward_fake: Callable[..., Outputs],
        save: Callable[[Any, tuple[Any, ...], Outputs], None],
        gradients: Callable[..., Sequence[Tensor | None]],
        mutates: Sequence[str] = (),
    ) -> None:
        self.forward = forward
        self.op = torch.library.custom_op(f"megalm::{name}", forward, mutates_args=())
        self.op.register_fake(forward_fake)
        backward_op = torch.library.custom_op(f"megalm::{name}_backward", backward, mutates_args=tuple(mutates))
        backward_op.register_fake(backward_fake)

        def save_for_library(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def library_gradients(ctx: Any, *grads: Tensor | None) -> Any:
            return tuple(gradients(backward_op, ctx, *grads))

        self.op.register_autograd(library_gradients, setup_context=save_for_library)

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Outputs:  # type: ignore[override]
                ctx.set_materialize_grads(False)
                outputs = forward(*inputs)
                save(ctx, inputs, outputs)
                return outputs

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return tuple(gradients(backward, ctx, *grads))

        Eager.__name__ = Eager.__qualname__ = f"{name}_eager"
        self.eager = Eager

    def __call__(self, *inputs: Any) -> Outputs:
        if torch.compiler.is_compiling():
            return self.op(*inputs)
        if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
            return self.eager.apply(*inputs)
        return self.forward(*inputs)
