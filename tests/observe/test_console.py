"""The progress line fits the terminal it is written on."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from megalm.observe.console import ConsoleHook, describe
from tests.observe.test_report import record

STEP = record(700, loss=5.12345, grad_norm=0.84, lr=2e-3, tokens_per_s=12345.6, mfu=0.41)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_progress_line_is_whole_at_every_width(width):
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    hook = ConsoleHook(console, 10)
    hook.on_train_start(SimpleNamespace(step=0, total_steps=1400))
    hook.on_step_end(SimpleNamespace(total_steps=1400), STEP)
    hook._progress.refresh()
    hook._progress.stop()
    line = [part for part in text.getvalue().replace("\x1b[2K", "\n").splitlines() if "loss" in part][-1]
    assert len(line.rstrip()) <= width and "…" not in line
    assert " 700/1400 " in line and "loss 5.1235" in line and " left " in line
    assert ("tokens/s" in line) == (width >= 80) and ("mfu" in line) == (width >= 100)


def test_less_telling_numbers_give_way_first():
    whole = describe(STEP)
    assert whole == "loss 5.1235  grad 0.84  lr 2.00e-03  12,346 tokens/s  mfu 41.0%"
    assert describe(STEP, len(whole)) == whole
    assert describe(STEP, len(whole) - 1) == "loss 5.1235  grad 0.84  12,346 tokens/s  mfu 41.0%"
    assert describe(STEP | {"skipped": 1}, 30) == "loss 5.1235  update refused"
