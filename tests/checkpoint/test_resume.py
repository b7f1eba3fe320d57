"""A run goes on from its checkpoint on another layout as if nothing had happened; `tools.bench resume` has more pairs."""

from tools.bench.resume import measure


def test_a_run_goes_on_on_another_layout(tmp_path):
    rows = list(measure("gpt2", tmp_path / "run", [("data 2 zero 1", "pipeline 2 1f1b")]))
    assert rows[0]["good"] and rows[0]["weight_difference"] < 1e-5 and rows[0]["moment_difference"] < 1e-4, rows
