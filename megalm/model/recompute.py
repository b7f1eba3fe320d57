"""Trading computation for memory: activations that are computed again in backward instead of kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Recipe:
    function: Callable[[], Tensor]
    shape: torch.Size

    def cook(self) -> Tensor:
        with torch.no_grad():
            return self.function().reshape(self.shape)


@contextmanager
def keep_function_of(tensor: Tensor, function: Callable[[], Tensor]) -> Iterator[None]:
    """Operations inside that would keep `tensor` for their backward keep `function`, which makes it again.

    Meant for a cheap producer (a norm, an activation) whose own input is kept anyway, in front of an expensive consumer
    (a matrix product): the product's copy of its input is then never held between forward and backward. Works with any
    way of running backward, also in parts, since autograd only ever sees one saved tensor replaced by another.

    Source:  the idea of selective recomputation, Korthikanti et al. 2022 (arXiv:2205.05198), sec. 5.
    """
    # What describes the tensor, not the tensor: a reference to it here would keep it until backward.
    pointer, numel, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype

    def pack(saved: Tensor) -> Tensor | _Recipe:
        same = saved.data_ptr() == pointer and saved.numel() == numel and saved.is_contiguous()
        return _Recipe(function, saved.shape) if same and saved.dtype == dtype else saved

    def unpack(kept: Tensor | _Recipe) -> Tensor:
        return kept.cook() if isinstance(kept, _Recipe) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
