"""The kernels' benchmark cases: what is called, on what, how many bytes it must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalm import ops
from megalm.ops.adamw import adamw_reference_
from megalm.ops.gradient_norm import l2_norm_nonfinite_reference

# (tokens, hidden, ffn, vocabulary, heads, head size): the 50M and 1.3G Llama shapes of the training benchmark, and 7b's.
# A GPU's multiprocessors are busy to their end only with many rows.
SIZES = {
    "tiny": (64, 32, 96, 512, 2, 16),
    "50m": (2048, 512, 1408, 32000, 8, 64),
    "1b": (16384, 2048, 5632, 32000, 16, 128),
    "7b": (16384, 4096, 11008, 50432, 32, 128),
}


@dataclass
class Case:
    """One line: what is called, on what, and how many bytes it must move.

    peers: further implementations by name, for ops that have no gradient and choose no backend by themselves.
    compiles: whether torch.compile can take its eager form.
    """

    name: str
    function: Callable[..., Any]
    inputs: list[Any]
    bytes_moved: int
    gradients: list[Tensor] | None = None
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    compiles: bool = True


def list_kernel_cases(size: str, dtype: torch.dtype, device: str) -> Iterator[Case]:
    tokens, hidden, ffn, vocabulary, heads, head = SIZES[size]
    width = dtype.itemsize

    def rand(*shape: int, leaf: bool = True) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(leaf)

    row = tokens * hidden * width
    norm = [rand(tokens, hidden), rand(hidden), 1e-5]
    yield Case("rms_norm", ops.rms_norm, norm, 2 * row)
    yield Case("rms_norm backward", ops.rms_norm, norm, 5 * row, [rand(tokens, hidden, leaf=False)])
    add = [rand(tokens, hidden), rand(tokens, hidden), rand(hidden), 1e-5]
    grads = [rand(tokens, hidden, leaf=False), rand(tokens, hidden, leaf=False)]
    yield Case("add_rms_norm", ops.add_rms_norm, add, 4 * row)
    yield Case("add_rms_norm backward", ops.add_rms_norm, add, 8 * row, grads)
    layer = [rand(tokens, hidden), rand(hidden), rand(hidden), 1e-5]
    yield Case("layer_norm", ops.layer_norm, layer, 2 * row)
    yield Case("layer_norm backward", ops.layer_norm, layer, 5 * row, grads[:1])
    yield Case("add_layer_norm", ops.add_layer_norm, [rand(tokens, hidden), *layer], 4 * row)
    yield Case("add_layer_norm backward", ops.add_layer_norm, [rand(tokens, hidden), *layer], 8 * row, grads)

    q = rand(tokens // 4, 4, heads, head)
    angles = torch.rand(tokens // 4, 1, 1, head // 2, device=device)
    turn = [q, angles.cos(), angles.sin()]
    each = q.numel() * width
    yield Case("rotary", ops.rotary, turn, 2 * each)
    yield Case("rotary backward", ops.rotary, turn, 4 * each, [rand(*q.shape, leaf=False)])
    neighbours = lambda x, cos, sin: ops.rotary(x, cos, sin, interleaved=True)  # noqa: E731
    yield Case("rotary_interleaved", neighbours, turn, 2 * each)
    still = [q.detach().clone(), *turn[1:]]
    yield Case("rotary_", ops.rotary_, still, 2 * each, peers={"torch": ops.rotary, "compile": ops.rotary})

    gated, flow = [rand(tokens, 2 * ffn)], [rand(tokens, ffn, leaf=False)]
    part = tokens * ffn * width
    for name in ("swiglu", "geglu"):
        yield Case(name, getattr(ops, name), gated, 3 * part)
        yield Case(f"{name} backward", getattr(ops, name), gated, 8 * part, flow)
    yield Case("bias_gelu backward", ops.bias_gelu, [rand(tokens, ffn), rand(ffn)], 5 * part, flow)

    def dropout_add(x: Tensor, residual: Tensor) -> Tensor:
        return ops.bias_dropout_add(x, residual, p=0.1, seed=1)

    def plain_dropout(x: Tensor, residual: Tensor) -> Tensor:
        return residual + torch.nn.functional.dropout(x, 0.1)

    drop = [rand(tokens, hidden), rand(tokens, hidden)]
    peers: dict[str, Callable[..., Any]] = {"torch": plain_dropout}
    yield Case("bias_dropout_add", dropout_add, drop, 3 * row, peers=peers)
    yield Case("bias_dropout_add backward", dropout_add, drop, 5 * row, grads[:1], peers=peers)

    square_side = min(tokens // 4, 1024)
    scores = rand(1, heads, square_side, square_side)
    slopes = torch.rand(heads, device=device)
    starts = ops.find_document_starts((torch.rand(1, square_side, device=device) < 0.01).cumsum(1))
    weigh = lambda x: ops.causal_softmax(x, scale=0.1, slopes=slopes, starts=starts)  # noqa: E731
    square = scores.numel() * width
    yield Case("causal_softmax", weigh, [scores], 2 * square)
    yield Case("causal_softmax backward", weigh, [scores], 5 * square, [rand(*scores.shape, leaf=False)])

    logits, labels = rand(tokens, vocabulary), torch.randint(0, vocabulary, (tokens,), device=device)
    every, weight = tokens * vocabulary * width, torch.ones(tokens, device=device)
    peers = {"torch": lambda x, y: torch.nn.functional.cross_entropy(x.float(), y, reduction="none")}
    yield Case("cross_entropy", ops.cross_entropy, [logits, labels], every, peers=peers)
    yield Case("cross_entropy backward", ops.cross_entropy, [logits, labels], 3 * every, [weight], peers=peers)

    # Among four ranks: [S, B, H] in zig-zag order, and [S, B, H] to each rank's [B, S / 4, H] and back.
    whole, packed = rand(tokens // 4, 4, hidden, leaf=False), rand(4, 4, tokens // 16, hidden, leaf=False)
    yield Case("sequence_pack zigzag", lambda x: ops.sequence_pack(x, 4, zigzag=True), [whole], 2 * row)
    yield Case("sequence_pack turned", lambda x: ops.sequence_pack(x, 4, out_dim=1), [whole], 2 * row)
    yield Case("sequence_join turned", lambda x: ops.sequence_join(x, dim=1, out_dim=0), [packed], 2 * row)
    yield Case("sequence_part zigzag", lambda x: ops.sequence_part(x, 4, 1, zigzag=True), [whole], row // 2)
    yield Case("sum_parts", ops.sum_parts, [packed], row + row // 4)

    count = 16 * 2**20
    state = [torch.rand(count, device=device) for _ in range(4)]
    options: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

    third = torch.tensor(3.0, device=device)

    def fused(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        torch._fused_adamw_([w], [g], [m], [v], [], [third], amsgrad=False, maximize=False, **options)

    yield Case(
        "adamw",
        lambda *t: ops.adamw_(*t, step=3, **options),
        state,
        28 * count,
        peers={"torch": fused, "compile": lambda *t: adamw_reference_(*t, step=3, **options)},
    )
    flat = torch.randn(count, device=device)
    lengths = [count // 16] * 16
    statistics = {"beta2": 0.95, "eps": 1e-8, "step": 3}

    def plain_squares(g: Tensor, v: Tensor) -> list[Tensor]:
        square = g.square()
        ratios = square / ((0.95 * v + 0.05 * square) / (1 - 0.95**3)).clamp(min=1e-16)
        return [part.sum(dtype=torch.float64) for part in ratios.split(lengths)]

    yield Case(
        "update_squares",
        lambda g, v: ops.update_squares(g, v, lengths, **statistics),  # type: ignore[arg-type]
        [state[1], state[3]],
        8 * count,
        peers={"torch": plain_squares},
    )
    yield Case(
        "l2_norm_nonfinite",
        lambda x: ops.l2_norm_nonfinite([x]),
        [flat],
        4 * count,
        peers={
            "torch": lambda x: (torch.linalg.vector_norm(x), torch.isfinite(x).logical_not_().sum()),
            "compile": lambda x: l2_norm_nonfinite_reference([x], x.device),
        },
    )
