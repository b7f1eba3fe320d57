"""The planner's command line: its answers as JSON and pages, and one message for every mistake."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megalm.plan.answers
import tools.plan
from megalm.config.cluster import make_accelerator, read_hardware
from megalm.config.compose import compose_config
from megalm.config.groups import list_groups
from megalm.plan.machine import find_machine, measure_cpu, measure_this_machine
from megalm.plan.request import KEYS
from megalm.plan.screen import plan_screen
from megalm.plan.summary import plan
from tools.subcommands import find_subcommands, run_tool


def ask(capsys, command: str) -> dict:
    assert run_tool(tools.plan, [*command.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


SMALL = (
    "+model=7b gpus=8 gpu=h100 parallel.data=8 parallel.data_mode=fully_shard"
    " train.micro_batch_size=2 train.global_batch_size=64"
)


@pytest.mark.parametrize(
    "command,keys",
    [
        ("shape +model=7b", "parameters active_parameters embedding_parameters bytes_bf16"),
        ("flops +model=7b", "flops_per_token model_flops_per_step hardware_flops_per_step flops_per_token_6nd"),
        (f"memory {SMALL}", "bytes_per_gpu bytes_available_per_gpu fits stages host_bytes_per_gpu"),
        (f"time {SMALL} tokens=140e9", "step_seconds days dollars mfu hfu tokens_per_second bubble_seconds"),
        (
            "time +model=7b tokens=140e9 gpus=64 gpu=a100-40gb mfu=0.507",
            "days dollars parameters flops_per_token step_seconds",
        ),
        (
            "cost +model=7b tokens=1e12 gpus=440 gpu=a100-40gb mfu=0.4 checkpoints=10",
            "dollars gpu_dollars storage_dollars days",
        ),
        (
            "cost +model=7b finetune_tokens=1e9 gpus=16 gpu=h100 mfu=0.4 multi_turn_chats=100",
            "dollars human_data_dollars",
        ),
        ("budget gpu_days=1000 gpu=h100 inference_tokens=1T", "parameters tokens choices tokens_per_parameter"),
        (
            "goodput gpus=1024 gpu=h100 days=10",
            "expected_failures checkpoint_interval_minutes effective_training_time_percent",
        ),
        (
            "search model=1b gpus=8 gpu=h100 batch_tokens=1M top=3",
            "best alternatives overrides step_seconds layouts_considered",
        ),
    ],
)
def test_json_keys_carry_their_units(command, keys, capsys):
    answer = ask(capsys, command)
    missing = [key for key in keys.split() if key not in answer]
    assert not missing


def test_launcher_overrides_and_own_keys_mix(capsys):
    answer = ask(capsys, "shape +model=7b model.num_layers=2 seq_length=4096")
    assert answer["num_layers"] == 2 and answer["seq_length"] == 4096
    assert ask(capsys, "shape model=7b") == ask(capsys, "shape +model=7b")
    assert run_tool(tools.plan, ["shape", "+model=7b", "--json", "model.num_layers=3"]) == 0
    assert json.loads(capsys.readouterr().out)["num_layers"] == 3


def test_words_for_numbers(capsys):
    one = ask(capsys, "time parameters=7B tokens=140B gpus=64 peak=312e12 mfu=50%")
    two = ask(capsys, "time N=7e9 D=20N gpus=64 peak=3.12e14 mfu=0.5")
    assert one == two


def test_price_and_price_list(capsys):
    base = "cost gpus=8 gpu=h100 days=1"
    assert ask(capsys, base)["dollars"] == pytest.approx(8 * 24 * 5.01)
    assert ask(capsys, base + " price=2")["dollars"] == pytest.approx(8 * 24 * 2)
    assert ask(capsys, base + " price_list=market-2026")["dollars"] < ask(capsys, base)["dollars"]


def test_measured_speed_gives_utilisation(capsys):
    answer = ask(capsys, "flops +model=7b gpus=8 gpu=h100 tokens_per_second=85144 convention=mosaic")
    assert answer["mfu_percent"] == pytest.approx(46.4, abs=0.1) and answer["mfu"] == pytest.approx(0.464, abs=0.001)
    assert answer["mfu_percent_causal"] < answer["mfu_percent_full"]


BAD = [
    ("time +model=7b gpu=v100 gpus=8", "unknown GPU 'v100'"),
    ("time +model=7b tokens=-5 gpus=8 gpu=h100", "must be above 0"),
    ("time +model=7b tokens=many gpus=8 gpu=h100", "a number is needed"),
    ("time +model=7b gpus=0 gpu=h100", "must be above 0"),
    ("time +model=7b gpus=8 gpu=h100 mfu=1.5", "at most 1"),
    ("time +model=8b gpus=8 gpu=h100", "no such model"),
    ("time +model=7b gpus=8 gpu=h100 wheels=4", "unknown key 'wheels'"),
    ("time +model=7b model.layers=4", "model.layers"),
    ("time gpus=8 gpu=h100", "no model"),
    ("budget dollars=0 gpu=h100", "must be above 0"),
    ("budget dollars=1e-9 gpu=h100", "no language model can be trained"),
    ("budget gpu=h100", "a budget is one of"),
    ("budget +model=70b tokens=1T dollars=1000 gpu=h100", "impossible budget"),
    ("goodput gpus=8 failures=-1", "at least 0"),
    ("goodput gpus=8 stall=long", "a time such as"),
    ("search model=llama3-70b gpus=1 gpu=a100-40gb", "in no layout"),
    ("memory +model=7b gpus=12 gpu=h100 parallel.tensor=8", "12 ranks cannot"),
    ("cost instruction_pairs=-3", "must be at least 0"),
    ("cost", "nothing to price"),
    ("ladder +model=tiny", "too small for a ladder"),
    ("fit nowhere.csv", "cannot be read"),
    ("fit", "no runs"),
]


@pytest.mark.parametrize("command,message", BAD, ids=[command for command, _ in BAD])
def test_mistakes_exit_2_with_one_message(command, message, capsys):
    assert run_tool(tools.plan, command.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.strip().count("\n") == 0
    assert not captured.out


def test_page_is_self_contained(tmp_path, capsys):
    file = tmp_path / "time.html"
    assert run_tool(tools.plan, ["time", *SMALL.split(), "--html", str(file)]) == 0
    page = file.read_text()
    assert page.count("<svg") >= 2 and "<table>" in page and "cost against model size" in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)
    assert run_tool(tools.plan, ["memory", *SMALL.split(), "--html", str(file)]) == 0
    assert "memory by part" in file.read_text()
    capsys.readouterr()


def test_ladder_writes_experiments_that_compose(tmp_path, capsys, monkeypatch):
    answer = ask(capsys, f"ladder model=1b rungs=2 out={tmp_path} gpu=h100")
    import yaml

    for rung in answer["rungs"]:
        written = yaml.safe_load((tmp_path / f"{rung['name']}.yaml").read_text())
        words = [f"+model={'tiny'}"] + [
            f"{group}.{key}={value if value is not None else 'null'}"
            for group in ("model", "train", "optim", "run")
            for key, value in written[group].items()
        ]
        config = compose_config(words)
        assert config.model.num_layers == rung["num_layers"] and config.optim.lr == pytest.approx(rung["lr"], rel=1e-2)


def test_every_accelerator_is_complete_and_has_sources():
    for name, record in read_hardware().items():
        chip = make_accelerator(record)
        assert chip.peak["bf16"] > 1e14 and chip.memory > 2**34
        for figure in (
            "peak_tflops",
            "memory_tb_per_s",
            "memory_gib",
            "link_gb_per_s",
            "network_gb_per_s",
            "matmul_efficiency",
        ):
            assert chip.sources.get(figure), (name, figure)
    assert set(read_hardware()) >= {"a100-40gb", "a100-80gb", "h100", "h200", "b200", "gh200", "mi300x"}
    assert set(read_hardware()) <= set(list_groups()["cluster"])


def test_cluster_group_and_gpu_name_mean_the_same():
    by_group = find_machine(compose_config(["+model=tiny", "cluster=h100", "cluster.gpus=8"]))
    by_name = find_machine(compose_config(["+model=tiny", "cluster.gpu=h100", "cluster.gpus=8"]))
    assert by_group == by_name and by_group.gpus == 8
    edited = find_machine(compose_config(["+model=tiny", "cluster=h100", "cluster.memory_gib=64", "cluster.price=1"]))
    assert edited.accelerator.memory == 64 * 2**30 and edited.price == 1


def test_this_machine_is_measured_once(tmp_path):
    file = tmp_path / "megalm" / "machine.json"
    first = measure_cpu(1, file)
    assert 1e6 < first["fp32_flops"] < 1e14 and 1e5 < first["copy_bytes_per_s"] < 1e12
    assert measure_cpu(1, file) == first
    file.write_text("not json")
    assert measure_cpu(1, file)["fp32_flops"] > 1e6


def test_plan_of_a_run_on_one_screen_and_as_json():
    config = compose_config(["+model=tiny", "train.steps=30", "device=cpu"])
    machine = measure_this_machine(gpu=False)
    answer = plan(config, machine)
    values = json.loads(json.dumps(answer.as_dict()))
    for key in ("parameters", "step_seconds", "bytes_per_gpu", "days", "mfu", "expected_failures", "tokens", "goodput"):
        assert key in values
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_screen(answer))
    screen = console.export_text()
    for word in ("what", "where", "how long", "memory", "step", "MFU"):
        assert word in screen
    assert screen.count("\n") < 40
    rows = answer.measured_beside({"step_seconds": 2 * answer.time.total, "unknown": 1.0})
    assert rows == [("step_seconds", answer.time.total, 2 * answer.time.total, 2.0)]


def test_plan_imports_no_torch():
    code = "import sys, megalm.plan.summary, megalm.plan.search, megalm.plan.scaling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_answer_is_a_subcommand_with_keys_that_are_explained():
    answers = {file.stem for file in Path(megalm.plan.answers.__file__).parent.glob("*.py")} - {"__init__"}
    assert answers | {"schedule"} == set(find_subcommands(tools.plan))
    for name in answers:
        module = importlib.import_module(f"megalm.plan.answers.{name}")
        assert set(module.KEYS) <= set(KEYS), name
        assert module.EXAMPLE.startswith(f"megalm plan {name} "), name
