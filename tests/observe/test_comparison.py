"""Planned and measured: medians of the steps that count."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from megalm.observe.comparison import ComparisonHook, describe_flat_part
from tests.observe.test_report import record


def compared(folder, records):
    """What plan.json says in the end, and what was printed."""
    (folder / "plan.json").write_text(json.dumps({"step_seconds": 1.0, "tokens_per_second": 10.0, "mfu": 0.5}))
    hook = ComparisonHook(folder, Console(file=io.StringIO(), width=100), SimpleNamespace(bytes=lambda: 2**20))
    trainer = SimpleNamespace(mesh=SimpleNamespace(device=SimpleNamespace(type="cpu")))
    for each in records:
        hook.on_step_end(trainer, each)
    hook.on_train_end(trainer, 0)
    return json.loads((folder / "plan.json").read_text()), hook.console.file.getvalue()


def test_a_step_made_twice_counts_once(tmp_path):
    slow = [record(step, step_time_s=9.0, mfu=0.1, hfu=0.1) for step in range(4, 40)]
    fast = [record(step, step_time_s=2.0, mfu=0.4, hfu=0.5) for step in range(4, 20)]
    plan, text = compared(tmp_path, [record(1), record(2), record(3), *slow, *fast])
    assert plan["measured"]["step_seconds"] == 2.0 and plan["measured"]["mfu"] == 0.4
    assert plan["measured"]["hfu"] == 0.5 and plan["measured"]["bytes_per_gpu"] == 2**20
    assert "2.00" in text and "step, s" in text


@pytest.mark.parametrize("mfu", [None, "nan"])
def test_what_was_not_measured_is_left_out(tmp_path, mfu):
    plan, text = compared(tmp_path, [record(step, mfu=mfu, hfu=mfu) for step in range(1, 9)])
    assert set(plan["measured"]) == {"step_seconds", "tokens_per_second", "bytes_per_gpu"} and "MFU" not in text


@pytest.mark.parametrize(("flat", "told"), [(45, True), (5, False)])
def test_a_small_run_is_told_what_of_its_memory_is_a_flat_figure(flat, told):
    stages = [{"runtime_bytes": flat * 2**20}]
    text = describe_flat_part({"bytes_per_gpu": 100 * 2**20, "memory": {"stages": stages}})
    assert (text is not None) == told and (text is None or "45 MiB" in text)
