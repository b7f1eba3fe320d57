"""The progress line fits the terminal it is written on."""

import io
import math
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


def said(hook, *records, start=0, total=100, end=True):
    """What the hook prints of these records, with no terminal."""
    trainer = SimpleNamespace(step=start, total_steps=total)
    hook.on_train_start(trainer)
    for each in records:
        hook.on_step_end(trainer, each)
    if end:
        hook.on_train_end(trainer, 0)
    return hook.console.file.getvalue()


def plain(log_every=10):
    return ConsoleHook(Console(file=io.StringIO(), width=140), log_every)


def test_a_run_that_goes_back_before_its_own_start_is_shown_as_any_other():
    steps = [51, 52, 53, *range(41, 61)]
    text = said(plain(), *(record(step, loss=float(step)) for step in steps), start=50)
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["51/100", "50/100", "51/100", "60/100"]
    assert "loss 45.5000" in lines[1], "the mean of the steps that were made again: 41 to 50"
    assert not any("left -" in line for line in lines)
    assert text.splitlines()[-1].split() == ["41", "60"] and "dotted: gone back on" in text


def test_one_loss_that_is_not_finite_does_not_hide_the_others():
    text = said(plain(), record(1), *(record(s, loss=math.nan if s == 5 else 4.0) for s in range(2, 11)), end=False)
    assert "loss 4.0000" in text.splitlines()[-1]
    text = said(plain(1), record(1, loss=math.nan, grad_norm=math.inf), record(2, loss="nan"), end=False)
    assert "loss NaN  grad inf" in text and text.count("loss NaN") == 2


def test_names_in_brackets_are_shown_as_they_are():
    named = record(10, **{"eval/loss": math.inf, "loss/[red]web[/red]": 2.0})
    assert "eval loss inf  [red]web[/red] 2.0000" in said(plain(), named, end=False)
