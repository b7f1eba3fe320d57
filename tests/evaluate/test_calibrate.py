"""Signal and noise of made-up ladders, whose answers are known."""

import json
import random

import pytest

from megalm.__main__ import main
from megalm.config.compose import compose_config
from megalm.config.errors import ConfigError
from megalm.config.saved import write_config_yaml
from megalm.evaluate.calibrate import LadderRun, calibrate, group_by_size, read_run
from tests.small_run import small_run


def made(parameters, final, noise, seed=0):
    rng = random.Random(seed)
    values = [final + rng.gauss(0, noise) for _ in range(5)]
    return LadderRun(None, parameters, {"task/acc": values, "task/bits_per_byte": [final] * 5}, {"task/acc": 0.02})


def test_a_task_that_tells_runs_apart_is_trusted_and_noise_is_not():
    clear = [made(100, final, 0.002, seed) for seed, final in enumerate((0.30, 0.40, 0.50))]
    blurred = [made(1000, 0.40, 0.05, seed) for seed in range(3)]
    found = {(one.parameters, one.figure): one for one in calibrate([*clear, *blurred], {"task": 0.25})}
    told = found[100, "task/acc"]
    assert told.trusted and told.signal == pytest.approx(0.5, rel=0.05) and told.noise == pytest.approx(0.005, rel=0.8)
    assert told.above_chance == pytest.approx((0.40 - 0.25) / 0.02, rel=0.05)
    assert found[1000, "task/acc"].trusted is False
    assert found[1000, "task/bits_per_byte"].ratio == 0.0


def test_runs_of_about_one_size_stand_together():
    groups = group_by_size([made(size, 0.5, 0.01) for size in (1000, 100, 120, 1250, 5000)])
    assert [[run.parameters for run in group] for group in groups] == [[100, 120], [1000, 1250], [5000]]


def test_one_run_says_nothing_of_signal():
    (one, _) = calibrate([made(10, 0.5, 0.1)])
    assert one.signal is None and one.ratio is None and one.trusted is None and one.noise > 0


def test_the_command_reads_runs(tmp_path, capsys):
    for number, final in enumerate((0.3, 0.5)):
        folder = tmp_path / "ladder" / f"run-{number}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(write_config_yaml(compose_config(small_run(tmp_path))))
        lines = [
            {
                "step": step,
                "loss": 1.0,
                "attempt": 0,
                "eval/facts/acc": final + step / 1e4,
                "eval/facts/acc_stderr": 0.05,
            }
            for step in range(1, 7)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["evaluate", "calibrate", str(tmp_path / "ladder"), "--suite", "smoke", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["runs"] == 2 and one["trusted"] and one["above_chance"] == pytest.approx((0.4 - 0.25) / 0.05, rel=0.02)
    assert main(["evaluate", "calibrate", str(tmp_path / "ladder")]) == 0
    assert "trust" in capsys.readouterr().out
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "attempt": 0}\n')
    with pytest.raises(ConfigError, match="no tasks were asked of it"):
        read_run(folder)
