"""Fully sharded data parallelism through torch's `fully_shard`: weights, gradients and optimizer state all split over
data x context.

Each layer's weights are gathered just before they are needed, forward and backward, and freed after (ZeRO-3). The
interface is that of `ShardedOptimizer`; tensor parallelism and the pipeline compose with it, since what is sharded is
the local parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megalm.config.errors import ConfigError
from megalm.config.optim import OptimConfig
from megalm.optim.buckets import split_axes
from megalm.optim.clip import sum_global_statistics
from megalm.optim.groups import Group, Groups, list_usual_choices
from megalm.optim.optimizer import Optimizer
from megalm.optim.rules import Update
from megalm.optim.stretches import Part, Stretch
from megalm.optim.tensor_rules import TensorRules
from megalm.parallel import collectives
from megalm.parallel.experts import Experts
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.slices import Box, Piece, Slice, attach, slice_of


@dataclass
class _Shard:
    """Rows [first, first + rows) of a local parameter: the part that this data rank keeps, with its optimizer state.

    Of an expert that no other rank holds a part is the whole, which `fully_shard` leaves alone.
    """

    parameter: nn.Parameter
    slice_: Slice
    group: Group
    first: int
    master: Tensor
    state: dict[str, Tensor]
    split: tuple[Axis, ...] = ()
    gradient: Tensor | None = None

    def segments(self) -> Iterator[tuple[Piece, int, int]]:
        """Each piece with the rows of this shard, [start, stop), that hold a part of it."""
        for piece in self.slice_.pieces:
            start = max(piece.row - self.first, 0)
            stop = min(piece.row + piece.shape[0] - self.first, self.master.shape[0])
            if start < stop:
                yield piece, start, stop

    def part(self) -> Part:
        """As `Bucket.part`."""
        state = {name: values.view(-1) for name, values in self.state.items()}
        return Part(
            tuple(self._stretches()),
            self.master.view(-1),
            state,
            self._flat_gradient,
            self.group,
            pieces=self.slice_.pieces,
            split=self.split,
        )

    def _flat_gradient(self) -> Tensor:
        assert self.gradient is not None
        return self.gradient.reshape(-1)

    def _stretches(self) -> Iterator[Stretch]:
        row = self.master[:1].numel()
        for piece, start, stop in self.segments():
            low, high = start * row, stop * row
            last = high if piece.owner else low
            yield Stretch(piece, low, high, (self.first + start - piece.row) * row, low, last)


class FullyShardedOptimizer(Optimizer):
    """Updates parameters that `fully_shard` has split, each by its group's rule; steps and meaning are
    those of `ShardedOptimizer`.

    Comm:   all-gather of each layer's weights in forward and in backward, reduce-scatter of its gradients after every
            backward pass
    Errors: ConfigError for a parameter that two chunks share, or ranks with different numbers of micro-batches.
    """

    def __init__(self, chunks: Sequence[nn.Module], optim: OptimConfig, mesh: Mesh) -> None:
        super().__init__(optim, mesh)
        self.axis = mesh.data_context
        self.shards: list[_Shard] = []
        self._groups = Groups(list_usual_choices(optim))
        seen: set[int] = set()
        for chunk in chunks:
            own = {id(parameter) for parameter in chunk.parameters()}
            if own & seen:
                raise ConfigError(
                    "parallel.data_mode=fully_shard cannot split an embedding that the first and the last stage share on one "
                    "rank (model.tie_embeddings=true, or model.prediction.depth above 0, with a V-shaped schedule). Use another "
                    "schedule, or data_mode=replicate with zero_stage=2."
                )
            seen |= own
        for chunk in chunks:
            self._shard(chunk)
        self._parts = [shard.part() for shard in self.shards]
        self.rules = TensorRules(optim, self._parts, mesh)

    def _shard(self, chunk: nn.Module) -> None:
        """Split a chunk layer by layer, then what is left of it; parameters keep their slices."""
        slices = {name: slice_of(parameter) for name, parameter in chunk.named_parameters()}
        dtypes = {parameter.dtype for parameter in chunk.parameters()}
        computed = dtypes.pop() if len(dtypes) == 1 else torch.float32
        chunk.float()  # the sharded parameters are the fp32 masters; modules compute with rounded copies
        policy = MixedPrecisionPolicy(
            param_dtype=None if computed == torch.float32 else computed,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        assert self.axis.group is not None
        device_mesh = DeviceMesh.from_group(self.axis.group, self.mesh.device.type)
        experts = [module for module in chunk.modules() if isinstance(module, Experts)]
        alone: set[nn.Parameter] = set()
        layers = [module for name in ("layers", "predictions") for module in getattr(chunk, name, [])]
        parts = [(module, device_mesh) for module in (*layers, chunk)]
        if self.mesh.expert_data.group is None:
            alone = {parameter for module in experts for parameter in module.parameters()}
        elif experts:
            device_mesh = DeviceMesh.from_group(self.mesh.expert_data.group, self.mesh.device.type)
            parts = [(module, device_mesh) for module in experts] + parts
        for part, device_mesh in parts:
            wrapped = fully_shard(part, mesh=device_mesh, mp_policy=policy, ignored_params=alone)
            # Gradients are summed; the objective is already divided by the tokens of the global batch.
            wrapped.set_force_sum_reduction_for_comms(True)
            wrapped.set_gradient_divide_factor(1.0)
        for name, parameter in chunk.named_parameters():
            attach(parameter, slices[name])
            axis: Axis = getattr(self.mesh, slices[name].reduce_over)
            local = parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()
            per_rank = -(-parameter.shape[0] // axis.size)
            first = min(axis.rank * per_rank, parameter.shape[0])
            group = self._groups.of(slices[name])
            state = {kind: torch.zeros_like(local) for kind in group.rule.states}
            split: tuple[Axis, ...] = ()
            if group.rule.whole_matrices:
                rows = (axis,) if isinstance(parameter, DTensor) else ()
                split = (*rows, *split_axes(slices[name].reduce_over, self.mesh))
            self.shards.append(_Shard(parameter, slices[name], group, first, local, state, split))

    def begin_step(self, num_micro_batches: int, *, even: bool = True) -> None:
        """Start accumulating. even: every data rank runs as many backward passes; each of them gathers weights, so they must.

        Errors: ConfigError where they do not
        """
        if not even:
            raise ConfigError(
                f"parallel.data_mode=fully_shard needs as many micro-batches on every data rank, and this one has "
                f"{num_micro_batches}, others one more or less: choose train.global_batch_size divisible by data x "
                "micro_batch_size, or data_mode=replicate with zero_stage=2."
            )
        for shard in self.shards:
            shard.parameter.grad = None

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Sum the gradients that are partial over further axes (`Piece.sum_over`); those over data x context are
        summed already."""
        partial_sums: dict[tuple[str, tuple[int, ...]], tuple[Axis, list[Tensor]]] = {}
        for shard in self.shards:
            grad = shard.parameter.grad
            if grad is None:
                shard.gradient = torch.zeros_like(shard.master)
            else:
                shard.gradient = grad.to_local() if isinstance(grad, DTensor) else grad
            for piece, start, stop in shard.segments():
                for axis in piece.sum_over:
                    group = partial_sums.setdefault((axis.name, axis.ranks), (axis, []))
                    group[1].append(shard.gradient[start:stop])
        for key in sorted(partial_sums):
            axis, segments = partial_sums[key]
            packed = collectives.all_reduce(torch.cat([segment.flatten() for segment in segments]), axis)
            for segment, summed in zip(segments, packed.split([s.numel() for s in segments]), strict=True):
                segment.copy_(summed.view(segment.shape))

    @torch.no_grad()
    def statistics(self, extra: Tensor | None = None) -> tuple[Tensor, ...]:
        """As `ShardedOptimizer.statistics`."""
        own = []
        for shard in self.shards:
            assert shard.gradient is not None
            own += [shard.gradient[start:stop].flatten() for piece, start, stop in shard.segments() if piece.owner]
        return sum_global_statistics(own, self.mesh, extra, self.rules)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float | Tensor = 1.0) -> None:
        """Update this rank's shards with gradients multiplied by `grad_scale`."""
        self.step_count += 1
        self.last_scale = float(grad_scale)
        rates = self.rules.rates(self.last_scale, self.step_count)
        for part, segments in zip(self._parts, rates, strict=True):
            if part.master.numel() or part.split:
                part.group.rule.step(part, Update(lr, self.step_count, grad_scale, segments))

    def gather_parameters(self) -> None:
        """Nothing to do: the masters are the parameters, and forward gathers them."""

    def copy_from_replicas(self, odd: Collection[int]) -> None:
        """Nothing to copy: each weight and state has one place."""

    def wait_weights(self) -> None:
        """Nothing to do: forward waits for what it gathers."""

    def parts(self) -> list[Part]:
        """The flat buffers with the global tensors in them."""
        return self._parts

    def boxes(self) -> list[Box]:
        """As `ShardedOptimizer.boxes`."""
        kinds = list(dict.fromkeys(name for shard in self.shards for name in shard.group.rule.states))
        found = []
        for kind in ("", *kinds):
            for shard in self.shards:
                values = shard.state.get(kind) if kind else shard.master
                if values is None:  # of another rule
                    continue
                for piece, start, stop in shard.segments():
                    row = piece.offset[0] + shard.first + start - piece.row
                    name = f"optimizer.{kind}.{piece.name}" if kind else piece.name
                    found.append(Box(name, piece.global_shape, (row, *piece.offset[1:]), values[start:stop]))
        return found
