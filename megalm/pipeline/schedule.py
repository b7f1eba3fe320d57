"""Pipeline schedules as data: for each rank the list of what it computes, sends and receives. No torch.

A pipeline has `ranks` ranks with `chunks` model chunks each. A *stage* is one chunk's place in the model: stage 0 holds
the embedding, stage ranks * chunks - 1 the loss. Every generator below writes only the order of computation; what has
to be sent and received follows from the placement of stages and is added by `add_communication`.

    megalm plan schedule --kind zb-v --stages 4 --microbatches 8
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from megalm.config.errors import ConfigError
from megalm.pipeline.actions import Action, Kind, Placement
from megalm.pipeline.timeline import build_timeline


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order."""

    kind: str
    placement: Placement
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]
    """For each rank, its actions in order. Neighbouring sends and receives are started together."""

    @cached_property
    def splits_backward(self) -> bool:
        """Whether some backward passes are split into input- and weight-gradient."""
        return any(action.kind is Kind.I for rank in self.actions for action in rank)

    @cached_property
    def computation(self) -> tuple[tuple[Action, ...], ...]:
        """Each rank's actions without communication."""
        return tuple(tuple(a for a in rank if not a.kind.is_communication) for rank in self.actions)

    def to_json(self) -> dict:
        """A plain structure: actions are written as KIND:micro_batch:chunk."""
        return {
            "kind": self.kind,
            "ranks": self.placement.ranks,
            "chunks": self.placement.chunks,
            "placement": self.placement.shape,
            "micro_batches": self.micro_batches,
            "actions": [[f"{a.kind.value}:{a.micro_batch}:{a.chunk}" for a in rank] for rank in self.actions],
        }


class _Order:
    """Writes one rank's order of computation; micro-batches of each chunk are taken in sequence."""

    def __init__(self, table: dict[Kind, list[list[Action]]], micro_batches: int) -> None:
        self._table = table
        self._micro_batches = micro_batches
        chunks = len(table[Kind.F])
        self.forwards = [0] * chunks
        self.backwards = [0] * chunks
        self._deferred: list[tuple[int, int]] = []
        self.order: list[Action] = []

    def _write(self, kind: Kind, chunk: int, micro_batch: int) -> None:
        # generators that need a minimum of micro-batches count on as if there were as many; those are dropped here
        if micro_batch < self._micro_batches:
            self.order.append(self._table[kind][chunk][micro_batch])

    def forward(self, chunk: int = 0) -> None:
        self._write(Kind.F, chunk, self.forwards[chunk])
        self.forwards[chunk] += 1

    def backward(self, chunk: int = 0) -> None:
        self._write(Kind.B, chunk, self.backwards[chunk])
        self.backwards[chunk] += 1

    def input_gradient(self, chunk: int = 0) -> None:
        self._write(Kind.I, chunk, self.backwards[chunk])
        self._deferred.append((chunk, self.backwards[chunk]))
        self.backwards[chunk] += 1

    def weight_gradient(self, chunk: int | None = None) -> None:
        """The oldest one that is due, of any chunk or of the one named."""
        due = next(d for d in self._deferred if chunk is None or d[0] == chunk)
        self._deferred.remove(due)
        self._write(Kind.W, *due)

    def flush(self, chunk: int | None = None) -> None:
        """All weight gradients that are due."""
        while any(chunk is None or d[0] == chunk for d in self._deferred):
            self.weight_gradient(chunk)


def _gpipe(order: _Order, rank: int, ranks: int, chunks: int, m: int) -> None:
    """All forward passes, then all backward ones (Huang et al. 2018, arXiv:1811.06965); with chunks, breadth first."""
    for chunk in range(chunks):
        for _ in range(m):
            order.forward(chunk)
    for chunk in reversed(range(chunks)):
        for _ in range(m):
            order.backward(chunk)


def _one_f_one_b(order: _Order, rank: int, ranks: int, chunks: int, m: int) -> None:
    """Backward as soon as it can be: at most `ranks` activations live (PipeDream-Flush, arXiv:2006.09503)."""
    ahead = min(ranks - 1 - rank, m)
    for _ in range(ahead):
        order.forward()
    for i in range(m):
        if ahead + i < m:
            order.forward()
        order.backward()


def _interleaved(order: _Order, rank: int, ranks: int, chunks: int, m: int) -> None:
    """1F1B over several chunks a rank: the bubble is `chunks` times smaller (Narayanan et al. 2021, arXiv:2104.04473).

    Micro-batches go through the chunks in groups of `ranks`; a remainder is spread over the groups.
    """
    groups = max(1, m // ranks)
    sizes = [m // groups + (g < m % groups) for g in range(groups)]
    visits = [chunk for size in sizes for chunk in range(chunks) for _ in range(size)]
    ahead = min(2 * (ranks - 1 - rank) + (chunks - 1) * max(sizes), len(visits))
    for chunk in visits[:ahead]:
        order.forward(chunk)
    for i, chunk in enumerate(visits):
        if ahead + i < len(visits):
            order.forward(visits[ahead + i])
        order.backward(chunks - 1 - chunk)


def _zb_h1(order: _Order, rank: int, ranks: int, chunks: int, m: int) -> None:
    """1F1B with weight gradients put off: a third of its bubble, its memory (Qi et al. 2023, arXiv:2401.10241).

    Rank r runs r input-gradients ahead of its weight-gradients: the gradient reaches rank 0 sooner, and no rank holds
    more than rank 0 of 1F1B does.
    """
    ahead = min(ranks - 1 - rank, m)
    for _ in range(ahead):
        order.forward()
    for i in range(m):
        if ahead + i < m:
            order.forward()
        order.input_gradient()
        if i >= rank:
            order.weight_gradient()
    order.flush()


def _zb_v(order: _Order, rank: int, ranks: int, chunks: int, m: int) -> None:
    """Two chunks in a V; no rank waits once it has begun, with the memory of 1F1B (Qi et al. 2023, sec. 6)."""
    total = max(m, 2 * ranks - 1)
    for _ in range(2 * (ranks - rank) - 1):
        order.forward(0)
    for _ in range(rank):
        order.forward(1)
        order.forward(0)
    for _ in range(ranks - rank):
        order.forward(1)
        order.input_gradient(1)
        order.weight_gradient(1)
    while order.forwards[1] < total:
        if order.forwards[0] < total:
            order.forward(0)
        for chunk in (0, 1):
            if chunk == 1:
                order.forward(1)
            order.input_gradient(chunk)
            order.weight_gradient(chunk)
    for _ in range(rank):
        order.input_gradient(0)
        order.input_gradient(1)
    for _ in range(ranks - rank):
        order.input_gradient(0)
        order.weight_gradient(0)
    order.flush(1)
    order.flush(0)


def _dualpipe_v(order: _Order, rank: int, ranks: int, chunks: int, m: int) -> None:
    """DualPipe (DeepSeek-V3, arXiv:2412.19437) folded into a V: each rank's weights are held once.

    In the middle every rank alternates forward and backward of its two chunks, so that one's communication can run
    under the other's computation; only the end is split, to fill the last bubble with weight gradients.
    """
    total = max(m, 2 * ranks)
    below = ranks - 1 - rank
    for _ in range(2 * below):
        order.forward(0)
    for _ in range(rank + 1):
        order.forward(0)
        order.forward(1)
    for _ in range(below):
        order.input_gradient(1)
        order.weight_gradient()
        order.forward(1)
    for _ in range(total - 2 * ranks + rank + 1):
        order.forward(0)
        order.backward(1)
        order.forward(1)
        order.backward(0)
    for _ in range(below):
        order.backward(1)
        order.forward(1)
        order.backward(0)
    ending = [1, 0] * (rank + 1)
    for position, chunk in enumerate(ending):
        if position < len(ending) // 2:
            order.backward(chunk)
        else:
            order.input_gradient(chunk)
    for _ in range(below):
        order.weight_gradient()
        order.input_gradient(0)
    order.flush()


_Generator = Callable[[_Order, int, int, int, int], None]
_KINDS: dict[str, tuple[_Generator, str, str]] = {
    # name: generator, placement of chunks, chunks a rank (with +: or more)
    "gpipe": (_gpipe, "loop", "1+"),
    "1f1b": (_one_f_one_b, "loop", "1"),
    "interleaved": (_interleaved, "loop", "2+"),
    "zb-h1": (_zb_h1, "loop", "1"),
    "zb-v": (_zb_v, "v", "2"),
    "dualpipe-v": (_dualpipe_v, "v", "2"),
}
KINDS = tuple(_KINDS)
"""Names of the schedules."""


def place_stages(kind: str, ranks: int, chunks: int | None = None) -> Placement:
    """Where the stages of a schedule sit.

    chunks: of each rank; None or 1: the fewest that the schedule works with (2 for interleaved, zb-v and dualpipe-v).
    Errors: ConfigError for a schedule that is not known or a number of chunks that it does not work with.
    """
    if kind not in _KINDS:
        raise ConfigError(f"parallel.schedule={kind}: not one of {', '.join(KINDS)}.")
    if ranks < 1:
        raise ConfigError(f"parallel.pipeline={ranks}: a pipeline has at least one rank.")
    _, shape, allowed = _KINDS[kind]
    fewest = int(allowed[0])
    if chunks is None or chunks == 1:
        chunks = fewest
    if chunks < fewest or (chunks > fewest and not allowed.endswith("+")):
        others = ", ".join(k for k, (_, _, a) in _KINDS.items() if a.endswith("+"))
        raise ConfigError(
            f"parallel.virtual_pipeline={chunks}: the schedule {kind} has {fewest} chunk(s) of layers on each rank. Set "
            f"parallel.virtual_pipeline={fewest}, or choose a schedule with any number: {others}."
        )
    return Placement(ranks, chunks, shape)


def build_schedule(kind: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """Build the schedule `kind` for so many pipeline ranks, micro-batches and chunks on each rank.

    One rank and one chunk is a pipeline like any other: forward, backward, forward, ...

    Errors: ConfigError as for `place_stages`, and for fewer than one micro-batch.
    """
    placement = place_stages(kind, ranks, chunks)
    if micro_batches < 1:
        raise ConfigError(f"{micro_batches} micro-batches: a pipeline step has at least one.")
    kinds = (Kind.F, Kind.B, Kind.I, Kind.W)
    table = {k: [[Action(k, i, c) for i in range(micro_batches)] for c in range(placement.chunks)] for k in kinds}
    computation = []
    for rank in range(ranks):
        order = _Order(table, micro_batches)
        _KINDS[kind][0](order, rank, ranks, placement.chunks, micro_batches)
        computation.append(order.order)
    return add_communication(kind, placement, micro_batches, computation)


def build_forward_schedule(placement: Placement, micro_batches: int) -> Schedule:
    """Forward passes only, for evaluation: groups of `ranks` micro-batches go through the chunks one after another."""
    computation: list[list[Action]] = [[] for _ in range(placement.ranks)]
    for start in range(0, micro_batches, placement.ranks):
        group = range(start, min(start + placement.ranks, micro_batches))
        actions = [Action(Kind.F, i, chunk) for chunk in range(placement.chunks) for i in group]
        for rank in computation:
            rank.extend(actions)
    return add_communication("forward", placement, micro_batches, computation)


def add_communication(
    kind_name: str, placement: Placement, micro_batches: int, computation: Sequence[Iterable[Action]]
) -> Schedule:
    """Add sends and receives to orders of computation.

    Every transfer gets a moment: when its producer ends, if F = I = W = 1 and B = 2 and sending takes no time. Both
    ranks do it at that moment: the sender right behind the producer, the receiver before whatever it is computing just
    then (so that the data moves under that computation). As all ranks' orders agree with one order in time, no set of
    ranks can wait for each other in a circle, even if every send blocked until it is received.
    """
    orders = [tuple(rank) for rank in computation]
    times = build_timeline(orders, placement, micro_batches)
    ranks, last = placement.ranks, placement.stages - 1
    kinds = (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION, Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT)
    # one object for equal actions of all ranks
    sends, receives, sends_back, receives_back = (
        [[Action(kind, i, chunk) for i in range(micro_batches)] for chunk in range(placement.chunks)] for kind in kinds
    )
    transfers: list[tuple[float, int, Action, int, Action]] = []  # when, from, what it does, to, what that does
    holder = [placement.rank(stage) for stage in range(placement.stages)]
    chunk_of = [placement.chunk(stage) for stage in range(placement.stages)]
    for rank, order in enumerate(orders):
        stages = placement.of_rank(rank)
        for end, (kind, micro_batch, chunk) in zip(times.ends[rank], order, strict=True):
            if kind is Kind.W:
                continue
            neighbour = stages[chunk] + (1 if kind is Kind.F else -1)
            if neighbour < 0 or neighbour > last or holder[neighbour] == rank:
                continue
            there = chunk_of[neighbour]
            if kind is Kind.F:
                pair = sends[chunk][micro_batch], receives[there][micro_batch]
            else:
                pair = sends_back[chunk][micro_batch], receives_back[there][micro_batch]
            transfers.append((end, rank, pair[0], holder[neighbour], pair[1]))
    transfers.sort(key=itemgetter(0))
    moments: list[list[tuple[float, Action]]] = [[] for _ in range(ranks)]
    for end, rank, send, peer, receive in transfers:
        moments[rank].append((end, send))
        moments[peer].append((end, receive))
    merged = []
    for order, ends, waiting in zip(orders, times.ends, moments, strict=True):
        result: list[Action] = []
        at, count = 0, len(waiting)
        for computed, end in zip(order, ends, strict=True):
            while at < count and waiting[at][0] < end:
                result.append(waiting[at][1])
                at += 1
            result.append(computed)
        result.extend(post for _, post in waiting[at:])
        merged.append(tuple(result))
    return Schedule(kind_name, placement, micro_batches, tuple(merged))
