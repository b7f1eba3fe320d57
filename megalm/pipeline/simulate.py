"""Checks a schedule and runs it against the clock: bubbles, memory, time. No torch; hundreds of ranks in a second."""

from dataclasses import asdict, dataclass

from megalm.pipeline.actions import Action, Kind, ScheduleError, describe
from megalm.pipeline.schedule import Schedule
from megalm.pipeline.timeline import Costs, Timeline, build_timeline

__all__ = ["Costs", "ScheduleError", "Simulation", "check", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """What a step of the pipeline costs. Times are in the unit of the costs."""

    schedule: Schedule
    costs: Costs
    timeline: Timeline
    makespan: float
    """From the first action of any rank to the last one's end."""
    busy: list[float]
    """Time that each rank computes."""
    waiting: list[float]
    """Time that each rank waits between its own first and last action."""
    peak_activations: list[int]
    """For each rank: most forward passes, of one chunk and micro-batch, whose activations are held at once.

    They are held from the forward pass until the whole backward pass, weight gradients included, is done.
    """

    @property
    def idle(self) -> float:
        """Idle time of one rank over the whole step, averaged over ranks: the bubble."""
        return self.makespan - sum(self.busy) / len(self.busy)

    @property
    def bubble_fraction(self) -> float:
        """Share of the ranks' time, from the step's first action to its last, in which nothing is computed."""
        return self.idle / self.makespan

    @property
    def waiting_fraction(self) -> float:
        """Share of a rank's own span, from its first to its last action, in which it waits; the worst rank's.

        It differs from bubble_fraction where ranks start one after another: zero-bubble papers count this one, as the
        next step's first forward passes can follow at once when no rank has to wait for the others to end theirs.
        """
        return max(w / (w + b) for w, b in zip(self.waiting, self.busy, strict=True))

    @property
    def peak_micro_batches(self) -> list[float]:
        """peak_activations in units of a whole rank's layers (all its chunks) for one micro-batch."""
        return [peak / self.schedule.placement.chunks for peak in self.peak_activations]

    def to_json(self) -> dict:
        """The figures, without the timeline."""
        placement = self.schedule.placement
        return {
            "kind": self.schedule.kind,
            "ranks": placement.ranks,
            "chunks": placement.chunks,
            "placement": placement.shape,
            "micro_batches": self.schedule.micro_batches,
            "costs": asdict(self.costs),
            "makespan": self.makespan,
            "bubble_fraction": self.bubble_fraction,
            "waiting_fraction": self.waiting_fraction,
            "busy": self.busy,
            "waiting": self.waiting,
            "peak_activations": self.peak_activations,
            "peak_micro_batches": self.peak_micro_batches,
        }


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Check the schedule, then run it with these costs (default: F = I = W = 1, B = 2, free communication).

    Errors: ScheduleError as for `check`.
    """
    check(schedule)
    costs = costs or Costs()
    orders = schedule.computation
    times = build_timeline(orders, schedule.placement, schedule.micro_batches, costs)
    spans = [
        (starts[0], ends[-1]) if ends else (0.0, 0.0) for starts, ends in zip(times.starts, times.ends, strict=True)
    ]
    busy = [sum(ends) - sum(starts) for starts, ends in zip(times.starts, times.ends, strict=True)]
    waiting = [max(0.0, end - start - b) for (start, end), b in zip(spans, busy, strict=True)]
    return Simulation(
        schedule=schedule,
        costs=costs,
        timeline=times,
        makespan=max(end for _, end in spans) - min(start for start, _ in spans),
        busy=busy,
        waiting=waiting,
        peak_activations=[_peak(order) for order in orders],
    )


def _peak(order: tuple[Action, ...]) -> int:
    held = most = 0
    for action in order:
        if action.kind is Kind.F:
            held += 1
            most = max(most, held)
        elif action.kind is not Kind.I:
            held -= 1
    return most


# what has been done for one stage and micro-batch
_FORWARD, _INPUT, _WEIGHT, _HAS_INPUT, _HAS_GRADIENT = 1, 2, 4, 8, 16
_SENT, _SENT_BACK = 32, 64


def check(schedule: Schedule) -> None:
    """Prove that a schedule is complete, in order, and cannot deadlock.

    Complete: every stage does forward and backward (whole, or both halves) exactly once for every micro-batch.
    In order: what a pass needs was computed on the same rank or received before; what is sent was computed before.
    No deadlock: run with the hardest rule there is, that every send and every receive blocks until its partner is at
    exactly the matching one. That also proves that messages between any two ranks are received in the order in which
    they are sent, as NCCL needs.

    Errors: ScheduleError that names the first action that is wrong, or each rank that waits and for what.
    """
    placement, m = schedule.placement, schedule.micro_batches
    last = placement.stages - 1
    state = [0] * (placement.stages * m)
    holder = [placement.rank(stage) for stage in range(placement.stages)]
    stages_of = [placement.of_rank(rank) for rank in range(placement.ranks)]
    position = [0] * placement.ranks
    posted: dict[int, int] = {}
    ready = list(range(placement.ranks))
    backward_offset = placement.stages * m

    def need(condition: object, rank: int, action: Action, why: str) -> None:
        if not condition:
            raise ScheduleError(f"rank {rank}: {describe(action)} {why}.")

    while ready:
        rank = ready.pop()
        actions, stages, at = schedule.actions[rank], stages_of[rank], position[rank]
        count = len(actions)
        while at < count:
            action = actions[at]
            kind, micro_batch, chunk = action
            stage = stages[chunk]
            key = stage * m + micro_batch
            done = state[key]
            if kind is Kind.F:
                need(not done & _FORWARD, rank, action, "is done twice")
                local = stage and holder[stage - 1] == rank
                given = not stage or (state[key - m] & _FORWARD if local else done & _HAS_INPUT)
                need(given, rank, action, "comes before its input")
                state[key] = done | _FORWARD
            elif kind is Kind.W:
                need(done & _INPUT, rank, action, "comes before its input-gradient")
                need(not done & _WEIGHT, rank, action, "is done twice")
                state[key] = done | _WEIGHT
            elif kind is Kind.B or kind is Kind.I:
                need(done & _FORWARD, rank, action, "comes before its forward")
                need(not done & _INPUT, rank, action, "is done twice")
                local = stage < last and holder[stage + 1] == rank
                given = stage == last or (state[key + m] & _INPUT if local else done & _HAS_GRADIENT)
                need(given, rank, action, "comes before its gradient")
                state[key] = done | (_INPUT if kind is Kind.I else _INPUT | _WEIGHT)
            else:
                # a transfer is known by the stage and micro-batch that receive it
                if kind is Kind.SEND_ACTIVATION:
                    need(stage < last, rank, action, "has no next stage")
                    need(done & _FORWARD, rank, action, "comes before its forward")
                    need(not done & _SENT, rank, action, "is done twice")
                    state[key] = done | _SENT
                    transfer, arrives = key + m, _HAS_INPUT
                elif kind is Kind.SEND_GRADIENT:
                    need(stage, rank, action, "has no previous stage")
                    need(done & _INPUT, rank, action, "comes before its backward")
                    need(not done & _SENT_BACK, rank, action, "is done twice")
                    state[key] = done | _SENT_BACK
                    transfer, arrives = key - m, _HAS_GRADIENT
                else:
                    arrives = _HAS_INPUT if kind is Kind.RECEIVE_ACTIVATION else _HAS_GRADIENT
                    transfer = key
                name = transfer if arrives == _HAS_INPUT else transfer + backward_offset
                other = posted.pop(name, None)
                if other is None:
                    posted[name] = rank
                    break
                need(other != rank, rank, action, "is a message to the rank itself")
                state[transfer] |= arrives
                position[other] += 1
                ready.append(other)
            at += 1
        position[rank] = at
    stuck = [rank for rank in range(placement.ranks) if position[rank] < len(schedule.actions[rank])]
    if stuck:
        said = "; ".join(f"rank {r} waits at {describe(schedule.actions[r][position[r]])}" for r in stuck[:8])
        raise ScheduleError(f"deadlock: {len(stuck)} of {placement.ranks} ranks wait for ever: {said}.")
    complete = _FORWARD if schedule.kind == "forward" else _FORWARD | _INPUT | _WEIGHT
    for key, done in enumerate(state):
        if done & complete != complete:
            stage, micro_batch = divmod(key, m)
            missing = [
                name
                for bit, name in ((_FORWARD, "forward"), (_INPUT, "input-gradient"), (_WEIGHT, "weight-gradient"))
                if complete & bit and not done & bit
            ]
            raise ScheduleError(
                f"incomplete: stage {stage} (rank {holder[stage]}) never does {' and '.join(missing)} "
                f"of micro-batch {micro_batch}."
            )
