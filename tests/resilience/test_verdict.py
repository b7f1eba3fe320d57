"""Who is named when several ranks fail at once, and whether the ranks are started again."""

import pytest

from megalm.resilience.page import Position
from megalm.resilience.restarts import BACKOFF_S, RestartPolicy
from megalm.resilience.verdict import Failure, describe_exit, find_culprit, is_communication_error

RESET = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3211"


def at(phase="backward", step=3, micro_batch=0):
    return Position(0, 0, phase, step, micro_batch, -1, -1)


def test_a_killed_rank_is_named_though_its_victim_spoke_first():
    failures = [Failure(0, None, RESET, 10), Failure(1, -9, None, 20)]
    assert find_culprit(failures, {0: at(), 1: at()}).rank == 1


def test_a_rank_that_left_without_a_word_comes_before_one_whose_exit_may_be_a_victims():
    failures = [Failure(0, 1, None, 10), Failure(1, 0, None, 20)]
    assert find_culprit(failures, {0: at(), 1: at()}).rank == 1


def test_of_those_that_raised_the_one_whose_error_is_its_own_is_named():
    failures = [Failure(0, 1, RESET, 10), Failure(1, 1, "ValueError: cut off", 30), Failure(2, 1, RESET, 20)]
    assert find_culprit(failures, {r: at() for r in range(3)}).rank == 1


def test_of_victims_alone_the_one_furthest_behind_is_named():
    failures = [Failure(0, None, RESET, 10), Failure(1, None, RESET, 11)]
    assert find_culprit(failures, {0: at("reduce"), 1: at("backward", micro_batch=2)}).rank == 1
    assert find_culprit(failures, {0: at("data", step=3), 1: at("reduce", step=2)}).rank == 1


@pytest.mark.parametrize(
    ("error", "victim"),
    [
        (RESET, True),
        ("DistBackendError: NCCL communicator was aborted", True),
        ("ConnectionResetError: [Errno 104] Connection reset by peer", True),
        ("RuntimeError: Timed out waiting 1800000ms for recv operation to complete", True),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", False),
        ("ValueError: connection closed", False),
        ("MemoryError: ", False),
    ],
)
def test_what_is_raised_because_another_rank_is_gone(error, victim):
    assert is_communication_error(error) is victim


def test_exits_in_words():
    assert [describe_exit(code) for code in (-9, -64, 3, None)] == [
        "signal 9 (SIGKILL)",
        "signal 64 (SIGRTMAX)",
        "exit code 3",
        None,
    ]
    assert Failure(1, -9, None, 0).describe() == "was killed by signal 9 (SIGKILL)"
    assert Failure(1, 0, None, 0).describe() == "ended with exit code 0 before the run's end"
    assert Failure(1, None, None, 0, frozen=True).describe() == "showed no life"
    assert Failure(1, 1, "ValueError: bad\nmore", 0).describe() == "raised ValueError: bad"


def killed(rank=0):
    return Failure(rank, -9, None, 0)


def test_waits_grow_without_progress_and_a_checkpoint_gives_all_restarts_back():
    policy = RestartPolicy(3)
    assert [policy.answer(killed(), "data of step 6", 2).wait_s for _ in range(3)] == list(BACKOFF_S[:3])
    assert (
        "after 3 restarts without a new durable step (resilience.max_restarts=3)"
        in policy.answer(killed(), "data of step 6", 2).reason
    )
    assert policy.answer(killed(), "data of step 8", 4).wait_s == 0.0, "step 4 is durable, and was not before"


def test_the_same_exception_in_the_same_step_twice_is_not_tried_a_third_time():
    policy = RestartPolicy(9)
    error = Failure(1, 1, "ValueError: bad record", 0)
    assert policy.answer(error, "data of step 6", 2).reason is None
    assert (
        "in data of step 6 for the second time: a restart does not help"
        in policy.answer(error, "data of step 6", 4).reason
    )


def test_other_steps_other_ranks_other_phases_and_victims_errors_are_tried_again():
    policy = RestartPolicy(9)
    for failure, step in (
        (Failure(1, 1, "ValueError: bad", 0), 5),
        (Failure(1, 1, "ValueError: bad", 0), 6),
        (Failure(0, 1, "ValueError: bad", 0), 5),
        (Failure(0, 1, RESET, 0), 5),
        (Failure(0, 1, RESET, 0), 5),
        (killed(), 5),
        (killed(), 5),
    ):
        assert policy.answer(failure, f"data of step {step}", 2).reason is None


def test_no_restart_where_none_is_allowed():
    assert (
        "resilience.max_restarts=0 allows no restart" in RestartPolicy(0).answer(killed(), "data of step 6", 2).reason
    )
