"""How many bytes a training step really holds: every tensor's storage counted from its birth to its death."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.config import Config
from megalm.data.batch import Batch
from megalm.model.transformer import Transformer
from megalm.objectives.next_token import NextToken
from megalm.optim.sharded import ShardedOptimizer
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.precision.policy import PrecisionPolicy


class Allocation(TorchDispatchMode):
    """Bytes of live storages, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._born(leaf.untyped_storage())
        return result

    def _born(self, storage) -> None:
        key = storage._cdata
        if key in self.live or not storage.nbytes():
            return
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def peak_of_training(config: Config, steps: int = 2) -> int:
    """Most bytes held while one rank trains: weights, gradients, optimizer and everything between."""
    mesh = Mesh.single(torch.device("cpu"))
    dtype = torch.float32 if config.precision.dtype == "fp32" else torch.bfloat16
    model, train = config.model, config.train
    with Allocation() as allocation:
        context = LayerContext(mesh, config.parallel, PrecisionPolicy(dtype), "cpu")
        chunk = Transformer(model, context, objective=NextToken(model.z_loss))
        optimizer = ShardedOptimizer([chunk], config.optim, mesh, config.parallel)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.vocab_size, (train.micro_batch_size, model.seq_length + 1), generator=generator)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).look_ahead(model.prediction.depth)
        for _ in range(steps):
            allocation.peak = allocation.now
            optimizer.begin_step(1)
            objective, report = chunk(None, batch)
            objective.backward()
            optimizer.finish_gradients()
            optimizer.statistics()
            optimizer.step(1e-4, 1.0)
            del objective, report
        return allocation.peak
