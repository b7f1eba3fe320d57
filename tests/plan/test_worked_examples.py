"""Worked examples of public talks, through the command line: days, dollars, ratios, failures."""

import json

import pytest

import tools.plan
from tools.subcommands import run_tool

TALK = "MosaicML's talks on the cost of language models (2023)"
BLOG = "MosaicML's posts on MPT-7B and MPT-30B (2023)"

# command, key of the JSON, printed answer, tolerance, source
EXAMPLES = [
    ("time N=7e9 D=20N gpus=64 peak=312e12", "days", 3.4, 0.01, TALK),
    ("time N=7e9 D=20N gpus=64 peak=312e12 mfu=0.507", "days", 6.7, 0.01, TALK),
    ("time N=7e9 D=20N gpus=64 gpu=a100-40gb mfu=50.7%", "days", 6.7, 0.01, TALK),
    ("time +model=7b tokens=140e9 gpus=64 gpu=a100-40gb mfu=0.507", "days", 6.7, 0.01, TALK),
    ("time +model=7b tokens=140e9 gpus=64 gpu=a100-40gb mfu=0.507", "days_at_peak", 3.4, 0.01, TALK),
    ("cost tokens=1e12 gpus=440 gpu=a100_40gb days=9.5", "dollars", 250_800, 0.01, BLOG),
    ("cost tokens=1e12 gpus=512 gpu=a100_40gb days=28.3", "dollars", 871_000, 0.01, BLOG),
    ("cost tokens=1e12 gpus=512 gpu=h100_80gb days=11.6", "dollars", 714_000, 0.01, BLOG),
    ("cost tokens=5e9 gpus=32 gpu=a100_80gb days=2.2", "dollars", 5_338, 0.01, BLOG),
    ("cost tokens=1e9 gpus=16 gpu=a100_40gb hours=21.8", "dollars", 871, 0.01, BLOG),
    ("cost tokens=1e9 gpus=16 gpu=h100_80gb hours=8.9", "dollars", 714, 0.01, BLOG),
    ("cost +model=7b tokens=1e12 gpus=440 gpu=a100_40gb days=9.5", "utilisation_6nd", 0.355, 0.01, BLOG),
    ("cost +model=30b tokens=1e12 gpus=512 gpu=a100_40gb days=28.3", "utilisation_6nd", 0.460, 0.01, BLOG),
    ("cost +model=30b tokens=1e12 gpus=512 gpu=h100_80gb days=11.6", "utilisation_6nd", 0.354, 0.01, BLOG),
    ("cost instruction_pairs=27540", "dollars", 826_200, 0.0, "Llama 2 (Touvron et al. 2023): 27,540 pairs at $30"),
    ("cost comparisons=1000000", "dollars", 8_000_000, 0.0, TALK),
    ("goodput observed_failures=1 observed_nodes=16 observed_days=7", "gpu_days_per_failure", 896, 0.0, TALK),
    ("goodput gpus=3072 failures=1", "mtti_hours", 7.8, 0.02, TALK),
    ("goodput gpus=3072 failures=1", "failures_per_day", 3.0, 0.03, TALK),
    ("goodput mtti=7.8h stall=60s gpus=3072", "checkpoint_interval_minutes", 31, 0.02, TALK),
    ("goodput mtti=7.8h stall=60s gpus=3072", "checkpoint_loss_percent", 6.5, 0.02, TALK),
    ("goodput mtti=7.8h stall=5s gpus=3072", "checkpoint_interval_minutes", 9, 0.02, TALK),
    ("goodput mtti=7.8h stall=5s gpus=3072", "checkpoint_loss_percent", 1.9, 0.02, TALK),
]


@pytest.mark.parametrize("command,key,answer,tolerance,source", EXAMPLES, ids=[e[0] + " " + e[1] for e in EXAMPLES])
def test_worked_example(command, key, answer, tolerance, source, capsys):
    assert run_tool(tools.plan, [*command.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[key] == pytest.approx(answer, rel=tolerance), source


@pytest.mark.parametrize(
    "name,ratio,source",
    [
        ("Chinchilla 70B", 20, "Hoffmann et al. 2022"),
        ("Llama-2 7B", 285, "Touvron et al. 2023"),
        ("Llama-2 70B", 28.5, "Touvron et al. 2023"),
        ("Llama-3 8B", 1875, "Meta 2024"),
        ("Llama-3 70B", 214.2, "Meta 2024"),
    ],
)
def test_tokens_per_parameter(name, ratio, source, capsys):
    assert run_tool(tools.plan, ["budget", "dollars=1M", "gpu=h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_parameter"][name] == pytest.approx(ratio, rel=0.005), source
