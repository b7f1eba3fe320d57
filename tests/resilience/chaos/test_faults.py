import os
import signal
import subprocess
import sys

import pytest

from megalm.config.chaos import ChaosConfig, FaultConfig, check_chaos
from megalm.config.errors import ConfigError
from megalm.resilience.chaos import faults
from megalm.resilience.chaos.faults import FaultyPulse, Occasion, add_faults, find_attempt, is_lost
from megalm.train.pulse import Pulse


@pytest.fixture
def struck(monkeypatch) -> list[str]:
    """The kinds that struck, in place of striking."""
    kinds: list[str] = []
    monkeypatch.setattr(faults, "strike", kinds.append)
    return kinds


def faulty(*given: FaultConfig) -> FaultyPulse:
    pulse = add_faults(Pulse(), ChaosConfig(list(given)), 0, 2, Occasion())
    assert isinstance(pulse, FaultyPulse)
    return pulse


def test_a_fault_strikes_once_at_its_phase_of_its_step(struck):
    pulse = faulty(FaultConfig("exit", "backward", step=3))
    pulse.complete_step(0, None)
    for step in (1, 2):
        pulse.begin_micro_batch("backward", 0)
        pulse.complete_step(step, None)
    pulse.begin_micro_batch("forward", 0)
    assert struck == []
    pulse.begin_micro_batch("backward", 0)
    pulse.begin_micro_batch("backward", 1)
    assert struck == ["exit"]


def test_what_is_before_the_steps_or_behind_them_can_be_struck(struck):
    pulse = faulty(FaultConfig("kill", "load", step=50), FaultConfig("stop", "end"))
    pulse.enter("load")
    pulse.complete_step(7, None)
    assert struck == ["kill"]
    pulse.finish(0)
    assert struck == ["kill", "stop"]


def test_a_phase_that_the_step_lacks_is_struck_in_the_next_one_that_has_it(struck):
    pulse = faulty(FaultConfig("exit", "save", step=4))
    pulse.complete_step(6, None)
    pulse.enter("save")
    assert struck == ["exit"]


def test_other_ranks_later_attempts_and_runs_without_faults_keep_their_own_pulse():
    own, chaos = Pulse(), ChaosConfig([FaultConfig(rank=1, attempts=2)])
    assert add_faults(own, ChaosConfig(), 0, 2, Occasion(0)) is own
    assert add_faults(own, chaos, 0, 2, Occasion(0)) is own
    assert add_faults(own, chaos, 1, 2, Occasion(1)) is not own
    assert add_faults(own, chaos, 1, 2, Occasion(2)) is own


def test_chance_takes_one_rank_an_attempt_the_same_for_a_seed(struck, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(faults.time, "monotonic", lambda: now[0])
    victims = []
    for attempt in range(40):
        now[0] = 0.0
        chaos = ChaosConfig([FaultConfig("kill", "data", step=10**6), FaultConfig("exit", "data")], mean_s=30, seed=3)
        pulses = [add_faults(Pulse(), chaos, rank, 4, Occasion(attempt)) for rank in range(4)]
        (victim,) = [rank for rank, pulse in enumerate(pulses) if isinstance(pulse, FaultyPulse)]
        pulses[victim].enter("data")
        assert len(struck) == attempt, "its time has not come"
        now[0] = 1000.0
        pulses[victim].enter("data")
        victims.append(victim)
    assert set(victims) == {0, 1, 2, 3} and set(struck) == {"kill", "exit"}


@pytest.mark.parametrize(
    ("kind", "status"),
    [("kill", -signal.SIGKILL), ("exit", 0), ("exception", 7), ("out_of_memory", 8), ("kill_launcher", 9)],
)
def test_each_kind_does_to_a_process_what_it_says(kind, status):
    program = f"""
import os, sys, time
from megalm.resilience.chaos.faults import ChaosError, strike
child = os.fork() if {kind!r} == "kill_launcher" else 0
if child:
    time.sleep(60)
try:
    strike({kind!r})
except ChaosError:
    os._exit(7)
except MemoryError:
    os._exit(8)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == (-signal.SIGKILL if kind == "kill_launcher" else status)


@pytest.mark.parametrize("kind", ["stop", "hang"])
def test_who_stands_still_goes_on_living(kind):
    program = f"from megalm.resilience.chaos.faults import strike; print(flush=True); strike({kind!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        if kind == "stop":
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
    finally:
        process.kill()
        process.communicate()


def test_the_attempt_is_the_launchers():
    assert find_attempt({}) == 0
    assert find_attempt({"TORCHELASTIC_RESTART_COUNT": "2"}) == 2
    assert find_attempt({"SLURM_RESTART_COUNT": "3"}) == 3


@pytest.mark.parametrize(
    ("chaos", "said"),
    [
        (ChaosConfig(mean_s=30), "without resilience.chaos.faults"),
        (ChaosConfig([FaultConfig(), FaultConfig(rank=1)]), r"faults\[1\].rank=1, but the ranks are 0 to 0"),
        (ChaosConfig([FaultConfig(phase="join")]), "a single rank joins nobody"),
    ],
)
def test_a_fault_that_cannot_strike_is_refused(chaos, said):
    with pytest.raises(ConfigError, match=said):
        check_chaos(chaos, 1)


def test_a_place_that_is_lost_ends_what_is_started_there_until_the_run_has_come_to_a_step():
    chaos = ChaosConfig([FaultConfig("lose", step=5, rank=1, until=9)])
    assert not is_lost(chaos, 1, 3) and is_lost(chaos, 1, 4) and is_lost(chaos, 1, 8) and not is_lost(chaos, 1, 9)
    assert not is_lost(chaos, 0, 4) and not is_lost(chaos, 1, 4, attempt=0)
    forever = ChaosConfig([FaultConfig("lose", step=5, rank=1)])
    assert is_lost(forever, 1, 10**6)


def test_a_lost_place_strikes_the_rank_that_stands_there_whatever_its_number(struck):
    chaos, own = ChaosConfig([FaultConfig("lose", "backward", step=5, rank=3)]), Pulse()
    assert add_faults(own, chaos, 3, 4, Occasion(1, 2), place=4) is own
    pulse = add_faults(own, chaos, 2, 4, Occasion(1, 2), place=3)
    pulse.enter("start")
    pulse.complete_step(4, None)
    pulse.begin_micro_batch("backward", 0)
    assert struck == ["lose"]
    add_faults(own, chaos, 2, 4, Occasion(2, 4), place=3).enter("start")
    assert struck == ["lose", "kill"]


@pytest.mark.parametrize("fault", [FaultConfig("kill", until=3), FaultConfig("lose", step=7, until=3)])
def test_a_step_at_which_nothing_comes_back_is_refused(fault):
    with pytest.raises(ConfigError, match="until=3"):
        check_chaos(ChaosConfig([fault]), 2)
