"""The report's page: what was measured, what happened, how it was set."""

import json
import math

import pytest

from megalm.journal import describe_event_details
from megalm.observe.report import MOST_EVENTS, draw_plots, render, write_report


def record(step, loss=3.0, **more):
    return {
        "step": step,
        "tokens": step * 100,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_s": 1000.0,
        "step_time_s": 0.1,
        "skipped": 0,
        "attempt": 0,
        **more,
    }


def titles(metrics):
    return [plot.title for plot in draw_plots(metrics, [])]


def test_plots_are_of_what_was_measured():
    assert titles([record(1), record(2)]) == ["loss", "gradient norm", "learning rate", "throughput"]
    more = [record(1, **{"loss/web": 2.0, "attention_logit": 3.0, "update_rms": None, "mfu": 0.5, "hfu": 0.6})]
    assert titles(more)[1:2] == ["loss by source"] and titles(more)[-2:] == ["largest attention logit", "utilisation"]
    assert len(draw_plots(more, [])[-1].lines) == 2
    assert len(draw_plots([record(1, mfu=0.5, hfu=0.5)], [])[-1].lines) == 1, "equal lines are drawn once"


def test_a_rollback_is_a_mark_and_a_band_on_every_plot_and_a_row_in_words():
    events = [
        {"time": 1.0, "step": 0, "kind": "start", "device": "cpu", "world_size": 2, "torch": "2.13.0"},
        {"time": 2.0, "step": 4, "kind": "spike", "onset": 4, "cause": "weights", "samples": [3, 5]},
        {"time": 2.5, "step": 4, "kind": "rollback", "to_step": 2, "samples": [16, 64], "lr_scale": 0.7},
    ]
    metrics = [record(s) for s in (1, 2, 3, 4)] + [record(s, attempt=1) for s in (3, 4, 5)]
    page = render("mine", metrics, events, {})
    plots = page.count("<svg")
    assert plots == 4
    told = "rollback at step 4, back to step 2, samples 16 to 63 skipped, learning rate x 0.7"
    assert page.count(f"<title>{told}</title></line>") == plots
    assert page.count(f"<title>{told}</title></rect>") == plots
    assert "<td>back to step 2, samples 16 to 63 skipped, learning rate x 0.7</td>" in page
    assert "on cpu, ranks: 2, torch 2.13.0" in page
    assert page.count('class="pale"') == plots, "on each plot the steps that were taken back"


def test_a_checkpoint_in_words():
    event = {"step": 9, "kind": "checkpoint", "bytes": 1234567, "seconds": 0.168, "stall_s": 0.0098}
    assert describe_event_details(event) == "1,234,567 bytes, in 0.168 s, of which the step waited 0.0098 s"


def test_very_many_events_are_cut_in_the_middle():
    events = [{"step": i, "kind": "skip"} for i in range(MOST_EVENTS + 7)]
    page = render("mine", [record(1)], events, {})
    assert page.count("all of it") == MOST_EVENTS and "7 events between these" in page
    assert f">{MOST_EVENTS + 6}</td>" in page


PLAN = {
    "step_seconds": 0.2,
    "tokens_per_second": 3510.4,
    "measured": {"step_seconds": 0.1, "tokens_per_second": 12345678.0},
}


def test_the_page_of_a_folder(tmp_path):
    lines = [record(1), record(2, **{"eval/loss": 2.5})]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "config.yaml").write_text("model:\n  name: <tiny>\n")
    (tmp_path / "sample.txt").write_text("Once & again")
    page = write_report(tmp_path).read_text()
    assert "<dt>held-out loss</dt><dd>2.5000</dd>" in page and "<dt>steps</dt><dd>2</dd>" in page
    assert "<td>step, s</td><td class=n>0.2</td><td class=n>0.1</td><td class=n>0.50</td>" in page
    assert "<td>tokens/s</td><td class=n>3,510</td><td class=n>12,345,678</td>" in page
    assert "&lt;tiny&gt;" in page and "<details open><summary>sample.txt</summary><pre>Once &amp; again" in page


def test_a_run_that_never_made_a_step_has_a_page(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "<dt>steps</dt><dd>0</dd>" in page and "nothing was measured" in page


def test_numbers_that_are_not_finite_have_a_page():
    losses = [3.0, math.nan, "nan", math.inf, "inf", 1e308, -1e308, None, 2.0]
    metrics = [
        record(i, loss, **{"eval/loss": loss, "loss/web": loss, "mfu": loss}) for i, loss in enumerate(losses, 1)
    ]
    del metrics[4]["tokens"], metrics[4]["step_time_s"], metrics[4]["skipped"]
    events = [
        {"time": 1.0, "step": 2, "kind": "spike", "loss": "nan", "expected": "nan", "grad_norm": math.inf},
        {"time": 1.0, "step": 2, "kind": "rollback", "to_step": "nan", "lr_scale": "nan", "samples": "nan"},
    ]
    plan = json.dumps({"step_seconds": "nan", "mfu": 0.5, "measured": {"step_seconds": 1.0, "mfu": math.nan}})
    page = render("mine", metrics, events, {"plan.json": plan})
    assert "spike at step 2, loss NaN, gradient norm inf" in page
    assert points_of(page) and "nan" not in points_of(page) and "inf" not in points_of(page)
    assert "<td>MFU, %</td>" in page


def points_of(page):
    return " ".join(part.split('"')[1] for part in page.split("<polyline points=")[1:])


@pytest.mark.parametrize("text", ["", "{", "[1]", "5", '{"measured": 5}', '{"measured": {"mfu": 0.5}, "mfu": "half"}'])
def test_a_damaged_plan_is_left_out_of_the_page(text):
    assert "planned and measured" not in render("mine", [record(1)], [], {"plan.json": text})
