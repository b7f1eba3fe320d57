"""Schedules as data: the pictures in the papers, their formulas, and proofs that broken ones are caught."""

import itertools
import time

import pytest

from megalm.config.errors import ConfigError
from megalm.pipeline import schedule as module
from megalm.pipeline.actions import Action, Kind, Placement, ScheduleError
from megalm.pipeline.schedule import (
    KINDS,
    Schedule,
    add_communication,
    build_forward_schedule,
    build_schedule,
    place_stages,
)
from megalm.pipeline.simulate import Costs, check, simulate

SIZES = list(itertools.product((1, 2, 3, 4, 5, 8), (1, 2, 3, 4, 5, 8, 11)))


def words(schedule: Schedule, rank: int) -> str:
    return " ".join(f"{a.kind.value}{a.micro_batch}{'ab'[a.chunk] if schedule.placement.chunks > 1 else ''}"
                    for a in schedule.computation[rank])  # fmt: skip


def test_single_stage_is_forward_backward_in_turn():
    only = build_schedule("1f1b", 1, 3)
    assert words(only, 0) == "F0 B0 F1 B1 F2 B2"
    assert only.actions == only.computation


def test_gpipe_and_1f1b_look_like_their_figures():
    assert [words(build_schedule("gpipe", 2, 3), r) for r in (0, 1)] == ["F0 F1 F2 B0 B1 B2"] * 2
    one = build_schedule("1f1b", 3, 4)
    assert words(one, 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert words(one, 1) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert words(one, 2) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_interleaved_takes_groups_of_micro_batches_through_the_chunks():
    two = build_schedule("interleaved", 2, 4)
    # Narayanan et al. 2021, figure 4, for two ranks: warm-up of 2 (ranks - 1 - rank) + (chunks - 1) ranks
    assert words(two, 0).startswith("F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a")
    assert words(two, 1).startswith("F0a F1a F0b B0b F1b B1b F2a B0a")


def test_zb_h1_is_figure_3_of_the_paper():
    s = build_schedule("zb-h1", 4, 8)
    assert words(s, 0).startswith("F0 F1 F2 F3 I0 W0 F4 I1 W1")
    assert words(s, 3).startswith("F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1")
    assert words(s, 3).endswith("F7 I7 W4 W5 W6 W7")


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_is_complete_and_free_of_deadlock(kind):
    for ranks, m in SIZES:
        for chunks in (1, 2, 3) if kind in ("gpipe", "interleaved") else (None,):
            schedule = build_schedule(kind, ranks, m, chunks)
            check(schedule)
            check(build_forward_schedule(schedule.placement, m))


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(kind):
    """(p-1)/(m+p-1): Huang et al. 2018; Narayanan et al. 2021, sec. 2.2; whatever F and B cost."""
    for (p, m), (f, b) in itertools.product(SIZES, ((1, 2), (2, 3), (1.5, 1))):
        if m < p and kind == "1f1b" and f != b / 2:
            continue
        s = simulate(build_schedule(kind, p, m), Costs(f, b / 2, b / 2))
        assert s.bubble_fraction == pytest.approx((p - 1) / (m + p - 1)), (p, m)
        assert max(s.peak_activations) == (m if kind == "gpipe" else min(p, m))
    assert simulate(build_schedule("1f1b", 4, 8)).peak_activations == [4, 3, 2, 1]


def test_bubble_of_interleaved_is_divided_by_the_chunks():
    """bubble / ideal = (p-1) / (v m): Narayanan et al. 2021, sec. 2.2 (micro-batches a multiple of ranks)."""
    for p, groups, v in itertools.product((2, 3, 4, 8), (1, 2, 3), (2, 3, 4)):
        m = groups * p
        s = simulate(build_schedule("interleaved", p, m, v), Costs(1, 1, 1))
        ideal = 3 * m * v
        assert s.idle / ideal == pytest.approx((p - 1) / (v * m))
        # looped GPipe has the same bubble and holds everything
        looped = simulate(build_schedule("gpipe", p, m, v))
        assert looped.idle == pytest.approx(s.idle) and max(looped.peak_activations) == m * v


@pytest.mark.parametrize("costs", [(1, 1, 1), (1, 1.25, 0.75), (2, 2, 1), (1, 1.1, 0.6)])
def test_bubble_of_zb_h1(costs):
    """(p-1)(F + I - W) against 1F1B's (p-1)(F + I + W), in 1F1B's memory: Qi et al. 2023, table 2."""
    f, i, w = costs
    for p, m in ((2, 4), (3, 6), (4, 8), (4, 16), (8, 16), (8, 24)):
        zero = simulate(build_schedule("zb-h1", p, m), Costs(f, i, w))
        one = simulate(build_schedule("1f1b", p, m), Costs(f, i, w))
        assert one.idle == pytest.approx((p - 1) * (f + i + w))
        assert zero.idle == pytest.approx((p - 1) * (f + i - w)), (p, m)
        assert max(zero.peak_activations) == max(one.peak_activations) == p


def test_zb_v_never_waits_in_the_memory_of_1f1b():
    """No bubble if F = I = W, with p micro-batches of activations on every rank: Qi et al. 2023, sec. 6."""
    for p, m in ((2, 4), (2, 9), (3, 6), (4, 8), (4, 12), (5, 10), (8, 16), (8, 31)):
        s = simulate(build_schedule("zb-v", p, m), Costs(1, 1, 1))
        assert s.waiting == [0.0] * p and s.waiting_fraction == 0.0
        # what is left of the bubble is only the ranks' later start
        assert s.makespan == 6 * m + p - 1
        assert max(s.peak_micro_batches) == p


def test_dualpipe_v_holds_half_a_micro_batch_more_and_ends_as_early():
    """DualPipe's memory of (2p + 1) chunk activations and its split ending (DeepSeek-V3, table 2)."""
    for p, m in ((2, 4), (4, 8), (4, 20), (8, 16)):
        s = simulate(build_schedule("dualpipe-v", p, m), Costs(1, 1, 1))
        assert max(s.peak_activations) == 2 * p + 1
        assert s.makespan == 6 * m + p - 1


def test_costs_of_communication_and_of_uneven_stages():
    s = build_schedule("gpipe", 3, 1)
    assert simulate(s, Costs(1, 1, 1, communication=0.25)).makespan == pytest.approx(9 + 4 * 0.25)
    assert simulate(s, Costs(stage_scale=[1, 1, 3])).makespan == pytest.approx(3 + 3 + 9)
    # the V's turn stays on one rank and costs nothing
    v = build_schedule("zb-v", 2, 1)
    assert simulate(v, Costs(communication=1.0)).makespan >= 4 + 4 + 4 * 1.0


def test_hundreds_of_ranks_in_a_second():
    schedule = build_schedule("1f1b", 256, 256)
    best = float("inf")
    for _ in range(3):  # the machine may be busy with other things
        started = time.process_time()
        s = simulate(schedule)
        best = min(best, time.process_time() - started)
    assert s.bubble_fraction == pytest.approx(255 / 511)
    assert best < 1.0, f"checking and timing 256 ranks x 256 micro-batches took {best:.2f} s"


def test_placements():
    loop, v = Placement(3, 2, "loop"), Placement(3, 2, "v")
    assert [loop.of_rank(r) for r in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [v.of_rank(r) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    for where in (loop, v, Placement(2, 4, "v")):
        for rank in range(where.ranks):
            for chunk, stage in enumerate(where.of_rank(rank)):
                assert where.rank(stage) == rank and where.chunk(stage) == chunk
    assert place_stages("zb-v", 4, 1) == place_stages("zb-v", 4) == Placement(4, 2, "v")
    assert place_stages("interleaved", 4).chunks == 2 and place_stages("1f1b", 4).chunks == 1


def test_receives_are_posted_before_the_computation_they_overlap():
    """The first rank receives the first gradient while it has nothing to do; the second its input, before forward."""
    s = build_schedule("1f1b", 2, 2)
    letters = [f"{a.kind.value}{a.micro_batch}" for a in s.actions[1]]
    # activation 1 arrives while B0 runs (F0 ends at 2, B0 at 4; F1 on rank 0 ends at 2)
    assert letters == ["RA0", "F0", "RA1", "B0", "SG0", "F1", "B1", "SG1"]


def test_unusable_requests_say_what_works():
    with pytest.raises(ConfigError, match="schedule=2f2b: not one of gpipe, 1f1b"):
        build_schedule("2f2b", 2, 2)
    with pytest.raises(ConfigError, match="virtual_pipeline=3: the schedule zb-v has 2 chunk"):
        build_schedule("zb-v", 2, 2, 3)
    with pytest.raises(ConfigError, match="virtual_pipeline=2: the schedule 1f1b has 1 chunk"):
        build_schedule("1f1b", 2, 2, 2)
    with pytest.raises(ConfigError, match="0 micro-batches"):
        build_schedule("1f1b", 2, 0)
    with pytest.raises(ConfigError, match="pipeline=0"):
        build_schedule("1f1b", 0, 2)


def changed(schedule: Schedule, rank: int, change) -> Schedule:
    actions = [list(r) for r in schedule.actions]
    change(actions[rank])
    return Schedule(schedule.kind, schedule.placement, schedule.micro_batches, tuple(map(tuple, actions)))


def swap(i, j):
    def change(actions):
        actions[i], actions[j] = actions[j], actions[i]

    return change


class TestBrokenSchedulesAreCaught:
    good = build_schedule("1f1b", 2, 2)

    def test_any_single_action_left_out(self):
        for kind in KINDS:
            schedule = build_schedule(kind, 2, 3)
            for rank, actions in enumerate(schedule.actions):
                for position in range(len(actions)):
                    with pytest.raises(ScheduleError):
                        check(changed(schedule, rank, lambda a, position=position: a.pop(position)))

    def test_any_single_action_done_twice(self):
        for kind in KINDS:
            schedule = build_schedule(kind, 2, 3)
            for rank, actions in enumerate(schedule.actions):
                for position in range(len(actions)):
                    with pytest.raises(ScheduleError):
                        check(changed(schedule, rank, lambda a, position=position: a.insert(position, a[position])))

    def test_messages_in_another_order_than_received(self):
        schedule = build_schedule("gpipe", 2, 2)
        receives = [i for i, a in enumerate(schedule.actions[1]) if a.kind is Kind.RECEIVE_ACTIVATION]
        with pytest.raises(ScheduleError, match="deadlock|before its input"):
            check(changed(schedule, 1, swap(*receives)))

    def test_a_circle_of_waiting_ranks(self):
        # both ranks send before they receive: with sends that block, neither goes on
        where = Placement(2, 1)
        rank0 = [Action(Kind.F, 0, 0), Action(Kind.SEND_ACTIVATION, 0, 0)]
        rank0 += [Action(Kind.F, 1, 0), Action(Kind.SEND_ACTIVATION, 1, 0)]
        rank0 += [Action(Kind.RECEIVE_GRADIENT, i, 0) for i in (0, 1)] + [Action(Kind.B, i, 0) for i in (0, 1)]
        rank1 = [Action(Kind.RECEIVE_ACTIVATION, 0, 0), Action(Kind.F, 0, 0), Action(Kind.B, 0, 0)]
        rank1 += [Action(Kind.SEND_GRADIENT, 0, 0), Action(Kind.RECEIVE_ACTIVATION, 1, 0)]
        rank1 += [Action(Kind.F, 1, 0), Action(Kind.B, 1, 0), Action(Kind.SEND_GRADIENT, 1, 0)]
        with pytest.raises(ScheduleError, match="deadlock: 2 of 2 ranks"):
            check(Schedule("circle", where, 2, (tuple(rank0), tuple(rank1))))

    def test_orders_of_computation_that_cannot_run(self):
        table = [[Action(Kind.F, 0, 0), Action(Kind.B, 0, 0)], [Action(Kind.B, 0, 0), Action(Kind.F, 0, 0)]]
        with pytest.raises(ScheduleError, match="B of micro-batch 0 on its chunk 0 comes before its forward"):
            add_communication("wrong", Placement(2, 1), 1, table)
        table = [[Action(k, i, 0) for i, k in ((0, "F"), (0, "B"), (1, "F"), (1, "B"))] for _ in range(2)]
        table = [[Action(Kind(k), i, c) for k, i, c in rank] for rank in table]
        table[1] = [table[1][2], table[1][3], table[1][0], table[1][1]]
        with pytest.raises(ScheduleError, match="deadlock"):
            add_communication("wrong", Placement(2, 1), 2, table)


ORACLES = {
    "gpipe": ("ScheduleGPipe", 1),
    "1f1b": ("Schedule1F1B", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zb-v": ("ScheduleZBVZeroBubble", 2),
    "dualpipe-v": ("ScheduleDualPipeV", 2),
}


@pytest.mark.parametrize("kind", ORACLES)
def test_equal_to_torch_pipelining(kind):
    """torch.distributed.pipelining's own schedules, as a second oracle, where it has the same one."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    name, chunks = ORACLES[kind]
    for ranks, m in ((2, 4), (4, 8), (4, 12), (3, 9)):
        theirs = torch_orders(schedules, name, ranks, m, chunks)
        ours = build_schedule(kind, ranks, m)
        for rank in range(ranks):
            mine = [(a.kind.value, ours.placement.stage(rank, a.chunk), a.micro_batch) for a in ours.computation[rank]]
            assert mine == theirs[rank], (kind, ranks, m, rank)


def torch_orders(schedules, name: str, ranks: int, m: int, chunks: int) -> list[list[tuple[str, int, int]]]:
    """Make torch's schedule write its order without stages or process groups."""
    cls = getattr(schedules, name)
    letters = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    made = cls.__new__(cls)
    made._n_microbatches = m
    made.pp_group_size = made._num_ranks = ranks
    made.n_local_stages = chunks
    made._num_stages = made.num_stages = ranks * chunks
    made.rank = 0
    if name == "ScheduleInterleaved1F1B":
        made.number_of_rounds = max(1, m // ranks)
        made.microbatches_per_round = m // made.number_of_rounds
    result = []
    for rank in range(ranks):
        if name in ("ScheduleGPipe", "Schedule1F1B"):
            made._stage = type("Stage", (), {"group_size": ranks, "stage_index": rank})()
            made._num_stages = ranks
            orders = made._get_pipeline_order()[rank]
        else:
            orders = made._calculate_single_rank_operations(rank)
        flat = []
        for action in orders:
            if action is None:
                continue
            for part in action.sub_actions if getattr(action, "sub_actions", None) else (action,):
                if part.computation_type.name not in letters:
                    continue  # gradient reduction is the optimizer's
                flat.append((letters[part.computation_type.name], part.stage_index, part.microbatch_index))
        if name == "Schedule1F1B" and rank == ranks - 1:
            # this table of torch's, which its runtime does not use, counts the last rank's forward passes from 1
            flat = [(letter, stage, i - (letter == "F")) for letter, stage, i in flat]
        result.append(flat)
    return result


def test_generators_do_not_import_torch():
    import subprocess
    import sys

    code = (
        "import sys; import megalm.pipeline.simulate, megalm.pipeline.draw, megalm.pipeline.partition; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert module.__doc__
