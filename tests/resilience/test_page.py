"""The page that ranks and their supervisor share, written by another process."""

import signal
import time
from multiprocessing import get_context

from megalm.resilience.page import PHASES, Row, RunPage, find_latest_step
from megalm.resilience.pulse import WARMUP_STEPS, RankPulse


def write(page):
    pulse = RankPulse(page, 1, lambda error: None)
    pulse.enter("load")
    pulse.complete_step(4, 3)
    pulse.enter("data")
    pulse.begin_micro_batch("backward", 2)


def test_what_another_process_writes_is_read_and_its_neighbours_row_is_not_touched():
    context = get_context("spawn")
    page = RunPage(context, 3)
    process = context.Process(target=write, args=(page,))
    process.start()
    process.join()
    assert process.exitcode == 0
    position = page.position(1)
    assert (position.phase, position.step, position.micro_batch, position.durable) == ("backward", 4, 2, 3)
    assert position.describe() == "backward of micro-batch 2 of step 5"
    assert page.position(0).step == page.position(2).step == -1
    assert find_latest_step(page.positions()) == 4


def test_a_row_begins_anew_and_keeps_how_long_phases_take():
    page = RunPage(get_context("spawn"), 1)
    row = Row(page, 0)
    row.mark(PHASES.index("data"), 0, learned=False)
    time.sleep(0.02)
    row.mark(PHASES.index("forward"), 0, learned=True)
    row.set("durable", 7)
    row.set("status", 130)
    page.begin(0)
    position = page.position(0)
    assert (position.phase, position.durable, position.status) == ("start", -1, -1)
    longest, seen = page.longest_s("data")
    assert 0.02 <= longest < 1.0 and seen == 1


def test_first_steps_teach_nothing_and_later_ones_do():
    page = RunPage(get_context("spawn"), 1)
    pulse = RankPulse(page, 0, lambda error: None)
    for step in range(WARMUP_STEPS + 3):
        pulse.complete_step(step, None)
        for phase in ("data", "forward", "reduce"):
            pulse.enter(phase)
    assert page.longest_s("data")[1] == 3
    assert page.longest_s("load")[1] == 0


def test_who_is_behind():
    page = RunPage(get_context("spawn"), 1)
    pulse = RankPulse(page, 0, lambda error: None)

    def order(phase, step, micro_batch=0):
        pulse.complete_step(step, None)
        pulse.begin_micro_batch(phase, micro_batch)
        return page.position(0).order

    in_turn = [
        order("data", 3),
        order("forward", 3, 0),
        order("backward", 3, 1),
        order("forward", 3, 2),
        order("reduce", 3),
        order("update", 3),
        order("data", 4),
    ]
    assert in_turn == sorted(in_turn)


def test_the_supervisors_signal_is_seen_by_all():
    page = RunPage(get_context("spawn"), 2)
    assert page.signal == 0
    page.signal = signal.SIGUSR1
    assert page.signal == signal.SIGUSR1 and page.position(0).phase == "start"
