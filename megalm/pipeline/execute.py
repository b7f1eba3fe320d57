"""Runs a schedule: the same code for one stage and for many."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalm.config.errors import ConfigError
from megalm.parallel import collectives, deferred
from megalm.pipeline.actions import Action, Kind
from megalm.pipeline.schedule import Schedule, build_forward_schedule, build_schedule
from megalm.precision.fp8 import KeptWeight

if TYPE_CHECKING:
    from megalm.parallel.mesh import Axis

Pass = Literal["forward", "backward"]

_FROM = {Kind.RECEIVE_ACTIVATION: -1, Kind.RECEIVE_GRADIENT: 1}
_TO = {Kind.SEND_ACTIVATION: 1, Kind.SEND_GRADIENT: -1}


class Executor:
    """One pipeline rank: computes its chunks' passes in the schedule's order and exchanges tensors with neighbours.

    A chunk is a module: forward(x, batch) -> (y, sums). The first stage gets x=None; y is what the next stage gets, and on
    the last one the scalar that backward runs from. sums: named tensors that any stage may hand back. A chunk's
    `loss_scale` buffer, where it has one, is set to the run's scale, by which losses of its own inside are to count.

    Shapes:  what travels between stages is [seq_length, micro_batch_size, hidden_size], where seq_length is S/(c*t)
             if the sequence is sharded over context and (sequence parallelism) tensor ranks
    Comm:    one activation forward and one gradient backward for each micro-batch and stage boundary between ranks;
             neighbouring sends and receives start as one batch, on the pipeline axis' group
    Memory:  an output's data is freed as soon as it is sent; only its place in the autograd graph stays until backward
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        schedule: Schedule,
        axis: "Axis",
        *,
        micro_batch_size: int,
        seq_length: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        split_backward: bool = True,
        kept_weights: Sequence[KeptWeight] = (),
    ) -> None:
        """
        split_backward: whether the schedule's weight gradients are put off; False computes them with the input's, and
            the schedule's W passes do nothing (for weights that are only whole during backward, as with fully_shard).
        kept_weights: weights that are quantised once for all passes of a run.

        Errors: ConfigError if the schedule is for other numbers of ranks or chunks than there are.
        """
        if schedule.placement.ranks != axis.size or schedule.placement.chunks != len(chunks):
            raise ConfigError(
                f"a schedule for {schedule.placement.ranks} ranks with {schedule.placement.chunks} chunk(s) each was "
                f"given to a pipeline of {axis.size} rank(s) with {len(chunks)} chunk(s) each; build it with these."
            )
        self.chunks = list(chunks)
        self.schedule = schedule
        self.axis = axis
        self.shape = (seq_length, micro_batch_size, hidden_size)
        self.dtype = dtype
        self.device = torch.device(device)
        self._kept_weights = kept_weights
        self._split = split_backward and schedule.placement.stages > 1
        self._placement = schedule.placement
        self._schedules = {schedule.micro_batches: schedule}
        self._forward_schedules: dict[int, Schedule] = {}
        if axis.size > 1 and self.device.type == "cuda":
            # NCCL sets a group up in its first operation, in which all of its ranks must take part
            dist.all_reduce(torch.zeros(1, device=self.device), group=axis.group)

    @property
    def has_last(self) -> bool:
        """Whether this rank holds the last stage, and so the objective's sums."""
        return self._placement.rank(self._placement.stages - 1) == self.axis.rank

    @property
    def has_first(self) -> bool:
        """Whether this rank holds the first stage."""
        return self._placement.rank(0) == self.axis.rank

    def set_seq_length(self, seq_length: int) -> None:
        """The passes that follow have sequences of this (local) length."""
        self.shape = (seq_length, *self.shape[1:])

    def run(
        self, micro_batches: Sequence[Any], scale: float = 1.0, begin: Callable[[Pass, int], None] | None = None
    ) -> list[dict[str, Tensor]]:
        """Forward and backward of all micro-batches; gradients of scale * objective accumulate in the parameters.

        begin: told of each pass before it is made, with the number of its micro-batch.

        Returns the sums that this rank's stages reported, for each micro-batch in order.
        The schedule is rebuilt for another number of micro-batches than it was made for.
        """
        count = len(micro_batches)
        for chunk in self.chunks:
            if (own_scale := getattr(chunk, "loss_scale", None)) is not None:
                own_scale.fill_(scale)
        if count not in self._schedules:
            placement = self._placement
            self._schedules[count] = build_schedule(self.schedule.kind, placement.ranks, count, placement.chunks)
        return _Step(self, micro_batches, scale, training=True).run(self._schedules[count], begin)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Any], instead: Any = None) -> list[dict[str, Tensor]]:
        """Forward passes only; any number of micro-batches. Returns as `run`. The caller sets eval mode.

        instead: what the last chunk computes in place of its own objective, handed to every chunk's forward.
        """
        count = len(micro_batches)
        if count not in self._forward_schedules:
            self._forward_schedules[count] = build_forward_schedule(self._placement, count)
        return _Step(self, micro_batches, 1.0, training=False, instead=instead).run(self._forward_schedules[count])


class _Step:
    """The tensors of one run through a schedule."""

    def __init__(
        self, executor: Executor, micro_batches: Sequence[Any], scale: float, training: bool, instead: Any = None
    ) -> None:
        self.executor = executor
        self.micro_batches = micro_batches
        self.scale = scale
        self.training = training
        self.others = () if instead is None else (instead,)
        self.placement = executor._placement
        self.reports: list[dict[str, Tensor]] = [{} for _ in micro_batches]
        # keys: (chunk, micro-batch)
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._roots: dict[tuple[int, int], GradientEdge] = {}
        self._weight_gradients: dict[tuple[int, int], deferred.Queue] = {}
        # by stage that needs it: tensors that were computed here, or are on their way
        self._arriving: dict[tuple[Kind, int, int], tuple[Tensor, list[dist.Work]]] = {}
        self._departing: dict[tuple[Kind, int, int], Tensor] = {}
        self._sent: list[tuple[dist.Work, list[Tensor]]] = []

    def run(self, schedule: Schedule, begin: Callable[[Pass, int], None] | None = None) -> list[dict[str, Tensor]]:
        compute = {Kind.F: self._forward, Kind.B: self._backward, Kind.I: self._backward, Kind.W: self._weights}
        actions = schedule.actions[self.executor.axis.rank]
        together: list[Action] = []
        for action in actions:
            if action.kind.is_communication:
                together.append(action)
                continue
            self._exchange(together)
            together = []
            if begin is not None:
                begin("forward" if action.kind is Kind.F else "backward", action.micro_batch)
            compute[action.kind](action)
        self._exchange(together)
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        return self.reports

    def _stage(self, chunk: int) -> int:
        return self.placement.stage(self.executor.axis.rank, chunk)

    def _forward(self, action: Action) -> None:
        executor, (_, micro_batch, chunk) = self.executor, action
        stage, key = self._stage(chunk), (chunk, micro_batch)
        x = None
        if stage:
            x = self._take(Kind.RECEIVE_ACTIVATION, micro_batch, chunk)
            if self.training:
                x.requires_grad_()
                self._inputs[key] = x
        output, sums = executor.chunks[chunk](x, self.micro_batches[micro_batch], *self.others)
        self._report(micro_batch, sums)
        if stage == self.placement.stages - 1:
            if self.training:
                self._roots[key] = get_gradient_edge(output * self.scale)
            return
        if tuple(output.shape) != executor.shape:
            raise RuntimeError(
                f"stage {stage} gave {list(output.shape)}, the pipeline was told that {list(executor.shape)} "
                "(sequence, micro-batch, hidden; local sizes) travel between stages."
            )
        if self.training:
            # the edge keeps the graph alive without the output's data
            self._roots[key] = get_gradient_edge(output)
        self._hand_over(Kind.F, action, stage, output.detach())

    def _report(self, micro_batch: int, sums: Mapping[str, Tensor]) -> None:
        """Keep what a stage reported; of several stages of this rank the values add up."""
        kept = self.reports[micro_batch]
        for name, value in sums.items():
            value = value.detach()
            kept[name] = kept[name] + value if name in kept else value

    def _backward(self, action: Action) -> None:
        executor, (kind, micro_batch, chunk) = self.executor, action
        stage, key = self._stage(chunk), (chunk, micro_batch)
        root = self._roots.pop(key)
        gradient = None
        if stage < self.placement.stages - 1:
            gradient = self._take(Kind.RECEIVE_GRADIENT, micro_batch, chunk)
        if kind is Kind.I and executor._split:
            queue = self._weight_gradients[key] = deferred.Queue()
            with deferred.defer_weight_gradients(queue):
                torch.autograd.backward([root], [gradient])
        else:
            torch.autograd.backward([root], [gradient])
        if stage:
            x = self._inputs.pop(key)
            assert x.grad is not None, f"stage {stage} does not depend on its input"
            self._hand_over(Kind.B, action, stage, x.grad)

    def _weights(self, action: Action) -> None:
        queue = self._weight_gradients.pop((action.chunk, action.micro_batch), None)
        if queue is not None:
            queue.run()

    def _take(self, kind: Kind, micro_batch: int, chunk: int) -> Tensor:
        tensor, works = self._arriving.pop((kind, micro_batch, chunk))
        for work in works:
            work.wait()
        return tensor

    def _hand_over(self, kind: Kind, action: Action, stage: int, tensor: Tensor) -> None:
        """Keep a result for the send that follows, or for this rank's own neighbouring stage."""
        forward = kind is Kind.F
        neighbour = stage + 1 if forward else stage - 1
        if self.placement.rank(neighbour) == self.executor.axis.rank:
            receive = Kind.RECEIVE_ACTIVATION if forward else Kind.RECEIVE_GRADIENT
            self._arriving[receive, action.micro_batch, self.placement.chunk(neighbour)] = (tensor, [])
        else:
            send = Kind.SEND_ACTIVATION if forward else Kind.SEND_GRADIENT
            self._departing[send, action.micro_batch, action.chunk] = tensor

    def _exchange(self, actions: list[Action]) -> None:
        """Start all these sends and receives as one batch."""
        self._sent = [(work, tensors) for work, tensors in self._sent if not work.is_completed()]
        if not actions:
            return
        executor = self.executor
        operations, sent, received = [], [], {}
        for action in actions:
            kind, micro_batch, chunk = action
            stage = self._stage(chunk)
            if kind in _TO:
                tensor = self._departing.pop((kind, micro_batch, chunk)).contiguous()
                peer = self.placement.rank(stage + _TO[kind])
                operations.append(dist.P2POp(dist.isend, tensor, executor.axis.ranks[peer], group=executor.axis.group))
                sent.append(tensor)
                collectives.record("send", executor.axis, tensor.numel() * tensor.element_size())
            else:
                tensor = torch.empty(executor.shape, dtype=executor.dtype, device=executor.device)
                peer = self.placement.rank(stage + _FROM[kind])
                operations.append(dist.P2POp(dist.irecv, tensor, executor.axis.ranks[peer], group=executor.axis.group))
                received[len(operations) - 1] = (action, tensor)
        works = dist.batch_isend_irecv(operations)
        # gloo gives one handle for each operation; NCCL one for the whole batch
        single = len(works) == len(operations)
        for position, (action, tensor) in received.items():
            key = (action.kind, action.micro_batch, action.chunk)
            self._arriving[key] = (tensor, [works[position]] if single else list(works))
        if sent:
            handles = [w for i, w in enumerate(works) if i not in received] if single else works
            self._sent.extend((work, sent) for work in handles)
