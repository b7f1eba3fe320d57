"""`inspect precision`: what each product of a run computes in, and how far it is from a wide one."""

import json

import pytest

from megalm.config.compose import compose_config
from megalm.config.saved import write_config_yaml
from tests.mixtures import mixture_run
from tests.train.test_mixture_runs import run_to
from tools.inspect.__main__ import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    words = mixture_run(
        folder, "qwen2", "precision=fp8", "precision.fp8.recipe=rowwise_wide", "precision.fp8.skip=[layers.0.attention.*]",
        "train.steps=2", "checkpoint.every=2",
    )  # fmt: skip
    (folder / "runs").mkdir()
    run_to(1, words, folder / "runs" / "small")
    (folder / "runs" / "small" / "config.yaml").write_text(write_config_yaml(compose_config(words)))
    return folder / "runs" / "small"


def test_it_shows_every_product(run, capsys):
    assert main(["precision", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["product"]: row for row in found["products"]}
    assert (found["recipe"], found["dtype"]) == ("rowwise_wide", "bf16")
    assert rows["layers.0.attention.qkv"]["runs_in"] == "bf16" and not rows["layers.0.attention.qkv"]["errors"]
    for name in (
        "layers.1.attention.qkv",
        "layers.0.mlp.down",
        "layers.1.mlp.experts.up",
        "layers.1.mlp.shared_expert.up",
    ):
        errors = rows[name]["errors"]
        assert rows[name]["runs_in"] == "rowwise_wide" and 0.02 < errors["y"] < 0.06 and 0.02 < errors["dx"] < 0.08
        assert errors["dW"] == 0 and errors["worst row"] >= errors["y"]


def test_it_prints_a_table_and_refuses_what_is_no_run(run, tmp_path, capsys):
    assert main(["precision", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "layers.1.mlp.experts.down" in printed and "weights of step 2" in printed
    assert main(["precision", str(tmp_path)]) == 2
    assert "is not there" in capsys.readouterr().err
