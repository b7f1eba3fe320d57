"""The optimizer: fp32 gradients in flat buckets, reduced while backward goes on; the update on this rank's share; ZeRO
stages 0, 1 and 2."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megalm.config.optim import OptimConfig
from megalm.optim.buckets import Bucket, plan_buckets
from megalm.optim.clip import sum_global_statistics
from megalm.optim.groups import Groups, list_usual_choices
from megalm.optim.optimizer import Optimizer
from megalm.optim.rules import Update
from megalm.optim.stretches import Part
from megalm.optim.tensor_rules import TensorRules
from megalm.parallel import collectives
from megalm.parallel.experts import Experts
from megalm.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.norm import Norm
from megalm.parallel.slices import Box

# Modules that read their own weights in their own forward, and nobody else does: waiting there for an all-gather is
# enough.
_SELF_CONTAINED = (ColumnParallelLinear, RowParallelLinear, Norm, Experts)
# ZeRO-2: reductions of one bucket that may be under way at once, each holding a full-length buffer.
_IN_FLIGHT = 2


class _ParallelSettings(Protocol):
    zero_stage: int
    bucket_mb: float


class _Sink:
    """Lets a layer accumulate its weight gradient straight into the bucket (see parallel.weight_gradient)."""

    def __init__(self, optimizer: ShardedOptimizer, bucket: Bucket, index: int) -> None:
        self.optimizer, self.bucket, self.index = optimizer, bucket, index

    @property
    def active(self) -> bool:
        return self.optimizer._accepting

    def open(self) -> tuple[Tensor, bool]:
        view = self.bucket.gradient_view(self.index)
        empty = not self.bucket.filled[self.index]
        self.bucket.filled[self.index] = True
        return view, empty

    def close(self) -> None:
        self.optimizer._arrived(self.bucket)


class ShardedOptimizer(Optimizer):
    """Updates all parameters of this rank's chunks, each by its group's rule.

    A step:  begin_step(micro-batches) -> backward passes -> finish_gradients() -> statistics() -> step(lr, scale)

    Gradients are SUMMED over micro-batches and over the data and context axes, in fp32; whoever calls backward scales
    the objective.
    Without `step` nothing changes: the update is refused by not making it.

    zero_stage 0: gradients all-reduced, every rank updates everything.
               1: gradients reduce-scattered, each rank updates its share, weights all-gathered under the next forward.
               2: as 1, and every micro-batch's gradients are reduce-scattered at once, so that only the share is kept.
    Source: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054)
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        optim: OptimConfig,
        mesh: Mesh,
        parallel: _ParallelSettings,
    ) -> None:
        super().__init__(optim, mesh)
        self.zero_stage = parallel.zero_stage
        self.buckets, self._uses = plan_buckets(
            chunks,
            Groups(list_usual_choices(optim)),
            mesh,
            zero_stage=self.zero_stage,
            bucket_bytes=parallel.bucket_mb * 2**20,
        )
        self._expected: dict[int, int] = {}
        self._every_micro_batch = False
        self._accepting = False
        self._home: dict[int, Bucket] = {}
        for bucket in self.buckets:
            for index, entry in enumerate(bucket.entries):
                parameter = entry.parameter
                self._home[id(parameter)] = bucket
                parameter.gradient_sink = _Sink(self, bucket, index)  # type: ignore[attr-defined]
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket, index))
        self._install_waits(chunks)
        self._parts = [bucket.part() for bucket in self.buckets]
        self.rules = TensorRules(optim, self._parts, mesh)

    # ------------------------------------------------------------------------------------------------------- gradients
    def begin_step(self, num_micro_batches: int, *, even: bool = True) -> None:
        """Start accumulating: this rank will run `num_micro_batches` backward passes through each of its chunks.

        even: every data rank runs as many, so that ZeRO-2 may reduce after each of them.
        """
        self.wait_weights()
        self._every_micro_batch = self.zero_stage == 2 and even
        for bucket in self.buckets:
            bucket.reset()
            one = sum(self._uses[id(entry.parameter)] for entry in bucket.entries)
            self._expected[id(bucket)] = one if self._early(bucket) else one * num_micro_batches
        self._accepting = True

    @torch.no_grad()
    def _on_gradient(self, bucket: Bucket, index: int, parameter: Tensor) -> None:
        """Autograd has a gradient of the parameter: move it into the bucket."""
        grad = parameter.grad
        if not self._accepting or grad is None:
            return
        view = bucket.gradient_view(index)
        view.add_(grad) if bucket.filled[index] else view.copy_(grad)
        bucket.filled[index] = True
        parameter.grad = None
        self._arrived(bucket)

    def _early(self, bucket: Bucket) -> bool:
        """Whether the bucket's gradients are reduced after every micro-batch. With nobody to share with they stay and add up:
        a reduction would count them again."""
        return self._every_micro_batch and bucket.shards > 1 and not bucket.late

    def _arrived(self, bucket: Bucket) -> None:
        bucket.arrived += 1
        if bucket.late or bucket.arrived < self._expected[id(bucket)]:
            return
        if self._early(bucket):
            bucket.arrived = 0
            bucket.launch()
            bucket.collect(leave=_IN_FLIGHT)
            return
        # Strictly in order, so that the ranks of an axis start the same reductions in the same order whatever their
        # schedules do.
        for earlier in self.buckets:
            if earlier.launched or self._early(earlier):
                continue
            if earlier.late or earlier.arrived < self._expected[id(earlier)]:
                return
            earlier.launch()

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Complete all reductions. Call it after the last backward pass.

        Comm: what is left of the reductions over data x context; gradients that are partial sums, over their axes
              (`Piece.sum_over`).
        """
        self._accepting = False
        for bucket in self.buckets:
            if not bucket.late and (not bucket.launched or bucket.arrived and self._early(bucket)):
                bucket.launch()
        late = [bucket for bucket in self.buckets if bucket.late]
        partial_sums: dict[tuple[str, tuple[int, ...]], tuple[Axis, list[Tensor]]] = {}
        for bucket in late:
            bucket.fill_missing()
            for axis, segment in bucket.partial_segments():
                partial_sums.setdefault((axis.name, axis.ranks), (axis, []))[1].append(segment)
        # Sorted by name: ranks that meet in several axes must reduce over them in one order.
        for key in sorted(partial_sums):
            axis, segments = partial_sums[key]
            if len(segments) == 1:
                collectives.all_reduce(segments[0], axis)
                continue
            packed = collectives.all_reduce(torch.cat(segments), axis)
            for segment, summed in zip(segments, packed.split([s.numel() for s in segments]), strict=True):
                segment.copy_(summed)
        for bucket in late:
            bucket.launch()
        for bucket in self.buckets:
            bucket.collect()

    @torch.no_grad()
    def statistics(self, extra: Tensor | None = None) -> tuple[Tensor, ...]:
        """(global gradient norm, number of non-finite gradient elements), fp64 scalars, the same on every rank.

        Every element of the global gradient counts once, however it is sharded, replicated or tied.
        extra: a 1-D tensor to be summed over the world in the same message; it comes back, fp64, as a third element.

        Comm: one all-reduce of 2 + len(extra) numbers over the world.
        """
        own = [part for bucket in self.buckets for part in bucket.own_gradients()]
        return sum_global_statistics(own, self.mesh, extra, self.rules)

    # ---------------------------------------------------------------------------------------------------------- update
    @torch.no_grad()
    def step(self, lr: float, grad_scale: float | Tensor = 1.0) -> None:
        """Update the weights with gradients multiplied by `grad_scale` (the clipping factor).

        Comm: ZeRO: all-gather of the weights, waited for by the modules that use them.
        """
        self.step_count += 1
        self.last_scale = float(grad_scale)
        rates = self.rules.rates(self.last_scale, self.step_count)
        whole = list(zip(self.buckets, self._parts, rates, strict=True))
        for bucket, part, segments in reversed(whole):  # as the next forward needs them
            part.group.rule.step(part, Update(lr, self.step_count, grad_scale, segments))
            bucket.gather()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Make the parameters those of the masters, on every rank: call it after `boxes()` were overwritten.

        Comm: ZeRO: all-gather of the weights.
        """
        self.wait_weights()
        for bucket in self.buckets:
            bucket.publish()
        self.wait_weights()

    @torch.no_grad()
    def copy_from_replicas(self, odd: Collection[int]) -> None:
        """Comm: without ZeRO a broadcast of masters and states; with it, where each has one place, the weights' all-gather."""
        self.wait_weights()
        for bucket in self.buckets:
            if bucket.shards == 1 and bucket.axis.size > 1:
                source = next(place for place, rank in enumerate(bucket.axis.ranks) if rank not in odd)
                for flat in (bucket.master, *bucket.state.values()):
                    collectives.broadcast(flat, bucket.axis, source)
            bucket.publish()
        self.wait_weights()

    def wait_weights(self) -> None:
        """Wait for all-gathers of weights that are under way: before weights are read other than by a chunk's
        forward."""
        for bucket in self.buckets:
            bucket.wait_weights()

    def _install_waits(self, chunks: Sequence[nn.Module]) -> None:
        """Before a module's forward, wait for its own weights; weights that others may read are waited for before the
        chunk's."""
        if all(bucket.shards == 1 for bucket in self.buckets):
            return
        for chunk in chunks:
            early: dict[int, Bucket] = {}
            for module in chunk.modules():
                own = {
                    id(home): home
                    for parameter in module.parameters(recurse=False)
                    if (home := self._home.get(id(parameter))) is not None
                }
                if isinstance(module, _SELF_CONTAINED):
                    module.register_forward_pre_hook(partial(_wait_for, list(own.values())))
                else:
                    early.update(own)
            chunk.register_forward_pre_hook(partial(_wait_for, list(early.values())))

    # ----------------------------------------------------------------------------------------------------------- state
    def parts(self) -> list[Part]:
        """The flat buffers with the global tensors in them."""
        return self._parts

    def boxes(self) -> list[Box]:
        """This rank's fp32 masters (under the parameters' names) and states of the rules
        (`optimizer.exp_avg.NAME`).

        The tensors are live views; after writing to them call `gather_parameters()`.
        """
        return [box for bucket in self.buckets for box in bucket.boxes()]


def _wait_for(buckets: list[Bucket], module: nn.Module, arguments: Any) -> None:
    for bucket in buckets:
        bucket.wait_weights()
