"""The ladder: from what is known of a step to what is done about it. Pure: no torch, no clock, no files.

    verdict      what it means                                  rungs that may answer, in the configured order
    data         the weights are fine, the batch is not         skip, skip_data, give_up
    unknown      one odd step and no probe to ask, or a fall    skip
    nonfinite    NaN or infinity, and the weights are fine      skip, rollback, lower_lr, reseed, widen, give_up
    weights      the weights are damaged                        rollback, lower_lr, reseed, widen, give_up

A hardware fault needs no rung: the replay that found it has repaired it. Each rung has a budget; where the budget is
spent the next one that fits answers, and where none is left for a single odd step the update is accepted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megalm.config.guard import GuardConfig, RungConfig

GO_BACK = ("rollback", "lower_lr", "reseed", "widen")
"""Actions that begin with going back to a state before the onset."""

_ANSWERS = {
    "data": ("skip", "skip_data", "give_up"),
    "unknown": ("skip",),
    "nonfinite": ("skip", *GO_BACK, "give_up"),
    "weights": (*GO_BACK, "give_up"),
}


def choose_unprobed_action(kind: str, lasting: bool) -> str:
    """Choose what the default ladder does when there is only the curve to judge by: none, skip or rollback."""
    if kind == "none":
        return "none"
    return "rollback" if lasting else "skip"


@dataclass(frozen=True)
class Decision:
    """One decision; it is written to events.jsonl, whole, before it is carried out."""

    number: int
    """Decisions are numbered over the life of the run, so that a restart knows which ones are still open."""
    step: int
    action: str
    """accept | skip | skip_data | rollback | lower_lr | reseed | widen | give_up"""
    verdict: str
    onset: int
    attempt: int = 1
    """1 for new trouble; when it comes again within `recurrence` steps 2, 3, ...: further back, and twice the data."""
    skip_before: int = 0
    """Batches before the onset to leave out."""
    skip_after: int = 0
    """Batches after this step to leave out."""
    lr_scale: float = 1.0
    rewarm_steps: int = 0
    reset_moments: bool = False
    """After going back the optimizer's moments start anew."""
    products: tuple[str, ...] = ()
    """Patterns of the 8-bit products that are computed in precision.dtype from then on."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Policy:
    """Keeps the books: what was done when, what is left of each budget, and the learning rate that goes with it."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.count = 0
        self.taken: list[tuple[int, int, str]] = []  # (step, rung, action)
        self.row = 0
        self.last_refused = -2
        self.widened: list[str] = []  # patterns of 8-bit products
        self.lr = (1.0, 0, 0)  # scale, step it was set for, steps of the way back

    def decide(self, step: int, verdict: str, onset: int, *, slow: bool = False, lasting: bool = False) -> Decision:
        """The answer to this verdict at this step; it is entered in the books.

        slow: the loss rose gradually. Going back and skipping data alone has not been seen to cure that (IDEFICS), so
        the ladder is entered at the first rung that changes the learning rate.
        lasting: of data, that it has been odd for so long that it is no single batch; where no data may be skipped any
        more it is taken for what the data now is, and accepted.
        """
        self.row = self.row + 1 if self.last_refused == step - 1 else 1
        chosen = self._choose(step, verdict, slow, lasting)
        self.count += 1
        if chosen is None:
            return Decision(self.count, step, "accept", verdict, onset)
        number, rung = chosen
        attempt = 1 + self._recent_returns(step) if rung.action in GO_BACK else 1
        if rung.action in ("skip", "skip_data"):
            self.last_refused = step
        self._enter(step, number, rung)
        return self._detail(step, verdict, onset, rung, attempt, number)

    def _choose(self, step: int, verdict: str, slow: bool, lasting: bool) -> tuple[int, RungConfig] | None:
        answers = _ANSWERS[verdict]
        rungs = self.config.rungs
        slow = slow and any(rung.action == "lower_lr" for rung in rungs)
        patience = next((rung.in_a_row for rung in rungs if rung.action == "skip"), 0)
        persistent = patience > 0 and self.row > patience or lasting
        if lasting and verdict == "data":
            answers = ("skip_data",)
        for number, rung in enumerate(rungs):
            if rung.action not in answers or self._left(number, rung, step) <= 0:
                continue
            if rung.action == "skip" and persistent:
                continue
            if rung.action != "skip" and verdict in ("data", "nonfinite") and not persistent:
                continue  # a single odd step is never worth more than a refused update
            if rung.action == "rollback" and slow:
                continue
            return number, rung
        return None

    def _left(self, number: int, rung: RungConfig, step: int) -> int:
        used = sum(1 for s, n, _ in self.taken if n == number and abs(step - s) <= rung.within)
        return rung.budget - used

    def _recent_returns(self, step: int) -> int:
        return sum(1 for s, _, a in self.taken if a in GO_BACK and abs(step - s) <= self.config.recurrence)

    def _enter(self, step: int, number: int, rung: RungConfig) -> None:
        furthest = max(r.within for r in self.config.rungs)
        self.taken = [t for t in self.taken if abs(step - t[0]) <= furthest] + [(step, number, rung.action)]
        if rung.action == "lower_lr":
            self.lr = (rung.lr_scale, step, rung.rewarm_steps)
        if rung.action == "widen":
            self.widened = list(dict.fromkeys([*self.widened, *rung.products]))

    def _detail(self, step: int, verdict: str, onset: int, rung: RungConfig, attempt: int, number: int) -> Decision:
        config = self.config
        before = after = 0
        if rung.action in GO_BACK:
            factor = 2 ** (attempt - 1)
            before = min(config.skip_before * factor, config.skip_limit)
            after = max(0, min(config.skip_after * factor, config.skip_limit - before))
        elif rung.action == "skip_data":
            times = sum(1 for s, n, _ in self.taken if n == number and abs(step - s) <= rung.within)
            after = min(rung.steps * 2 ** (times - 1), config.skip_limit)
        scale, rewarm = (rung.lr_scale, rung.rewarm_steps) if rung.action == "lower_lr" else (1.0, 0)
        reset = rung.reset_moments
        products = tuple(rung.products) if rung.action == "widen" else ()
        return Decision(
            self.count, step, rung.action, verdict, onset, attempt, before, after, scale, rewarm, reset, products
        )

    def lr_scale(self, step: int) -> float:
        """Factor on the scheduled learning rate at this step: back to 1, linearly, over the rung's `rewarm_steps`."""
        scale, since, steps = self.lr
        if scale >= 1.0 or steps <= 0:
            return min(scale, 1.0)
        done = min(1.0, max(0.0, (step - since) / steps))
        return scale + (1.0 - scale) * done

    def adopt(self, decision: Decision) -> None:
        """Enter a decision that a run made before it died, read back from its events."""
        self.count = max(self.count, decision.number)
        for number, rung in enumerate(self.config.rungs):
            same = rung.action != "lower_lr" or rung.lr_scale == decision.lr_scale
            same = same and (rung.action != "widen" or rung.products == list(decision.products))
            if rung.action == decision.action and same:
                self._enter(decision.step, number, rung)
                return

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "taken": [list(t) for t in self.taken],
            "row": self.row,
            "last_refused": self.last_refused,
            "lr": list(self.lr),
            "widened": self.widened,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.row, self.last_refused = state["count"], state["row"], state["last_refused"]
        self.taken = [(int(s), int(n), str(a)) for s, n, a in state["taken"]]
        self.widened = list(state.get("widened", ()))
        scale, since, steps = state["lr"]
        self.lr = (float(scale), int(since), int(steps))
