"""The guard in the assembled product: what it does about damage, with everything attached that reads what it wrote."""

from tests.assembled.runs import train

QUICK = (
    "train.eval_every=0",
    "train.eval_sequences=4",
    "train.micro_batch_size=4",
    "guard.detector.window=32",
    "guard.detector.min_window=16",
    "guard.snapshot_lags=[4,8,16]",
    "guard.probe_sequences=2",
    "checkpoint.every=10",
)
"""A guard that has its baseline after 16 steps and a clean snapshot soon after."""


def test_a_gradient_that_is_not_finite_is_refused_and_told(tmp_path):
    run = train(
        tmp_path, *QUICK, "train.steps=26", "guard.provoke.kind=gradient_scale", "guard.provoke.factor=inf",
        "guard.provoke.step=22",
    ).ended_well()  # fmt: skip
    (spike,), (skip,) = run.of("spike"), run.of("skip")
    assert spike["step"] == skip["step"] == 22 and spike["grad_norm"] == "nan" and spike["cause"] == "nonfinite"
    assert [record["step"] for record in run.records] == list(range(1, 27)) and run.records[21]["skipped"] == 1
    told = "spike at step 22, onset 22, cause nonfinite, loss"
    assert told in run.shown and told in run.report and "gradient norm NaN" in run.report
