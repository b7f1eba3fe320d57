"""When each action of a pipeline starts and ends, given what each costs. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalm.pipeline.actions import Action, Placement, ScheduleError, describe


@dataclass(frozen=True)
class Costs:
    """How long one chunk's passes take, in any unit of time. A full backward pass takes what its halves take."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    communication: float = 0.0
    """Time from the end of a pass until the next rank has its result; it does not keep either rank busy."""
    stage_scale: Sequence[float] | None = None
    """Relative cost of each stage, for stages that are cut unevenly; None: all the same."""

    def of(self, kind: str) -> float:
        """Cost of an F, B, I or W."""
        if kind == "F":
            return self.forward
        if kind == "I":
            return self.input_gradient
        return self.weight_gradient if kind == "W" else self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class Timeline:
    """Start and end of each action, for each rank in the order of its list."""

    starts: list[list[float]]
    ends: list[list[float]]

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(ends[-1] for ends in self.ends if ends)


def build_timeline(
    orders: Sequence[Sequence[Action]], placement: Placement, micro_batches: int, costs: Costs | None = None
) -> Timeline:
    """Run orders of computation against the clock: each rank does its next action when its inputs are there.

    Errors: ScheduleError if some rank waits for ever; the message says each waiting rank and for what.
    """
    costs = costs or Costs()
    stages, m = placement.stages, micro_batches
    scale = list(costs.stage_scale or [1.0] * stages)
    holder = [placement.rank(stage) for stage in range(stages)]
    of_rank = [placement.of_rank(rank) for rank in range(placement.ranks)]
    duration = {kind: [costs.of(kind) * s for s in scale] for kind in ("F", "B", "I", "W")}
    # when the result of (forward or backward, stage, micro-batch) is there for the stage that needs it; < 0: not yet
    arrived = [-1.0] * (2 * stages * m)
    backward = stages * m
    # a forward pass also provides for its own backward pass, on the last stage
    own = [-1.0] * (stages * m)
    clock = [0.0] * placement.ranks
    position = [0] * placement.ranks
    starts: list[list[float]] = [[] for _ in orders]
    ends: list[list[float]] = [[] for _ in orders]
    waits_for: dict[int, int] = {}
    ready = list(range(placement.ranks))
    while ready:
        rank = ready.pop()
        order, now, at = orders[rank], clock[rank], position[rank]
        my_stages, my_starts, my_ends = of_rank[rank], starts[rank], ends[rank]
        count = len(order)
        while at < count:
            kind, micro_batch, chunk = order[at]
            stage = my_stages[chunk]
            key = stage * m + micro_batch
            if kind == "F":
                if stage and (there := arrived[key - m]) < 0:
                    waits_for[key - m] = rank
                    break
                start = max(now, there) if stage else now
                target, needed_by = key, stage + 1
            elif kind == "W":
                start, target, needed_by = now, -1, -1
            else:
                if own[key] < 0:
                    raise ScheduleError(f"rank {rank}: {describe(order[at])} comes before its forward.")
                if stage < stages - 1:
                    there = arrived[backward + key + m]
                    if there < 0:
                        waits_for[backward + key + m] = rank
                        break
                    start = max(now, there)
                else:
                    start = now
                target, needed_by = backward + key, stage - 1
            now = start + duration[kind][stage]
            my_starts.append(start)
            my_ends.append(now)
            at += 1
            if target >= 0:
                if target < backward:
                    own[target] = now
                if 0 <= needed_by < stages:
                    arrived[target] = now if holder[needed_by] == rank else now + costs.communication
                    if target in waits_for:
                        ready.append(waits_for.pop(target))
        clock[rank], position[rank] = now, at
    stuck = [rank for rank in range(placement.ranks) if position[rank] < len(orders[rank])]
    if stuck:
        said = "; ".join(f"rank {rank} cannot do {describe(orders[rank][position[rank]])}" for rank in stuck[:8])
        raise ScheduleError(f"deadlock: {len(stuck)} of {placement.ranks} ranks wait for ever: {said}.")
    return Timeline(starts, ends)
