"""Who counts as frozen or hanging, and who does not: positions over time, without processes."""

from dataclasses import replace

import pytest

from megalm.resilience.page import Position
from megalm.resilience.silence import FROZEN_S, LEAST_S, MARGIN, Limits, Watch

CEILING = 1800.0


class Ranks:
    """Ranks whose positions a test moves, and a watch that looks at them five times a second."""

    def __init__(self, count, longest=None, fixed=0.0, nap=1.0):
        self.longest = longest or {}
        self.positions = [Position(0, 0, "forward", 3, 0, -1, -1) for _ in range(count)]
        limits = Limits(lambda phase: self.longest.get(phase, (0.0, 0)), CEILING, fixed)
        self.watch, self.now, self.moment = Watch(count, limits, nap), 0.0, 0

    def live(self, seconds, working=(), asleep=(), every=0.2):
        """Let time pass: all but those asleep show life, those working get on. Returns the first verdict."""
        for _ in range(round(seconds / every)):
            self.now += every
            self.moment += 1
            for rank, position in enumerate(self.positions):
                changes = {} if rank in asleep else {"alive_ns": self.moment}
                if rank in working:
                    changes["mark_ns"] = self.moment
                self.positions[rank] = replace(position, **changes)
            verdict = self.watch.look(self.positions, self.now)
            if verdict is not None:
                return verdict
        return None

    def enter(self, rank, phase, step=3, micro_batch=0):
        self.moment += 1
        self.positions[rank] = replace(
            self.positions[rank], phase=phase, step=step, micro_batch=micro_batch, mark_ns=self.moment
        )


SHORT = dict.fromkeys(["data", "forward", "backward", "reduce", "update"], (0.01, 50))


def test_ranks_that_get_on_raise_no_alarm():
    assert Ranks(3, SHORT).live(3600, working=(0, 1, 2), every=0.5) is None


def test_a_process_without_life_is_frozen_though_others_live():
    ranks = Ranks(2, SHORT)
    verdict = ranks.live(30, working=(0,), asleep=(1,))
    assert (verdict.rank, verdict.frozen) == (1, True) and FROZEN_S < verdict.silent_s < FROZEN_S + 1


def test_where_nobody_gets_on_the_rank_furthest_behind_is_named():
    ranks = Ranks(3, SHORT)
    ranks.enter(0, "reduce")
    ranks.enter(1, "backward", micro_batch=2)
    ranks.enter(2, "reduce")
    verdict = ranks.live(60)
    assert (verdict.rank, verdict.frozen) == (1, False) and LEAST_S < verdict.silent_s < LEAST_S + 1


def test_one_that_is_slow_and_gets_on_is_waited_for():
    ranks = Ranks(2, SHORT)
    ranks.enter(0, "reduce")
    for micro_batch in range(20):
        ranks.enter(1, "forward", micro_batch=micro_batch)
        assert ranks.live(LEAST_S - 1) is None


def test_a_phase_has_the_time_that_it_took_before():
    ranks = Ranks(1, SHORT | {"save": (40.0, 3)})
    ranks.enter(0, "save")
    assert ranks.live(40 * MARGIN - 1) is None
    assert ranks.live(3).rank == 0


@pytest.mark.parametrize("phase", ["start", "join", "load", "evaluate"])
def test_a_phase_that_nobody_knows_has_the_whole_ceiling(phase):
    ranks = Ranks(2, SHORT)
    for rank in (0, 1):
        ranks.enter(rank, phase)
    assert ranks.live(CEILING - 2, every=1.0) is None
    assert ranks.live(10, every=1.0) is not None


def test_a_limit_that_is_given_holds_for_every_phase():
    ranks = Ranks(1, SHORT | {"save": (40.0, 3)}, fixed=20.0)
    ranks.enter(0, "save")
    assert ranks.live(19) is None and ranks.live(3) is not None


def test_a_machine_that_slept_raises_no_alarm():
    ranks = Ranks(2, SHORT)
    assert ranks.live(2, working=(0, 1)) is None
    ranks.now += 7200  # suspended: nobody ran, the watch neither
    assert ranks.live(2, working=(0, 1)) is None


def test_ranks_that_have_ended_are_not_waited_for():
    ranks = Ranks(2, SHORT)
    ranks.positions[1] = replace(ranks.positions[1], status=0)
    assert ranks.live(60, working=(0,), asleep=(1,)) is None


def test_a_process_that_is_starting_may_hold_pythons_lock():
    ranks = Ranks(1, SHORT)
    ranks.enter(0, "start", step=-1)
    assert ranks.live(60, asleep=(0,)) is None
