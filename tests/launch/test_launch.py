"""The command line as a person uses it: bad input is one message and status 2; ranks start, stop and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.checkpoint.reader import CheckpointReader
from megalm.config import Config, ConfigError
from megalm.config.compose import compose_config
from megalm.config.saved import load_config, make_config
from megalm.launch import __main__ as launch
from megalm.launch.dry_run import describe_ranks
from megalm.launch.resolve import resolve
from megalm.launch.world import find_world
from megalm.plan.machine import make_planned_machine
from megalm.plan.summary import plan
from tests.small_run import small_run

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys, *arguments: str) -> str:
    assert launch.main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.err


def test_without_a_model_the_models_are_listed(capsys):
    message = refused(capsys)
    assert all(name in message for name in ("tiny", "30b", "llama3-70b", "fits here"))


def test_a_model_that_cannot_fit_is_refused_with_figures(capsys, tmp_path):
    message = refused(capsys, "+model=30b", f"run.dir={tmp_path}", "device=cpu")
    assert "30b needs" in message and "GiB" in message and "largest model" in message
    assert "What it takes" in message and "H100" in message and "$" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train=[nowhere/text_document]", "nowhere/text_document"),
        ("data.tokenizer=nowhere/tokenizer.json", "nowhere/tokenizer.json"),
        ("train.micro_batch_size=3", "train.global_batch_size=8"),
        ("parallel.tensor=3", "tensor=3"),
        ("optim.lr=fast", "optim.lr=fast"),
        ("guard=bold", "bold"),
    ],
)
def test_bad_input_is_one_message(capsys, tmp_path, override, said):
    assert said in refused(capsys, *small_run(tmp_path), override)


def test_a_corrupt_index_names_the_file(capsys, tmp_path):
    arguments = small_run(tmp_path)
    index = tmp_path / "numbers_text_document.idx"
    index.write_bytes(index.read_bytes()[:40])
    assert "numbers_text_document.idx" in refused(capsys, *arguments)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(capsys, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0")).save(str(tmp_path / "t.json"))
    message = refused(capsys, *small_run(tmp_path), f"data.tokenizer={tmp_path}/t.json")
    assert "100" in message and "model.vocab_size" in message


def test_help_lists_groups(capsys):
    assert launch.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "guard" in shown and "llama3-8b" in shown


@pytest.mark.parametrize("word", ["parallel=auto", "+parallel=auto"])
def test_the_planner_chooses_a_layout_where_it_is_asked_to(capsys, word):
    assert launch.main(["+model=tiny", word, "parallel.tensor=2", "world_size=2", "dry_run=true"]) == 0
    assert "free of deadlock" in " ".join(capsys.readouterr().out.split())


def test_a_layout_of_no_known_name_is_told_that_auto_is_one(capsys):
    assert "or auto" in refused(capsys, "+model=tiny", "parallel=fastest")


def test_a_dry_run_of_thousands_of_ranks(capsys):
    layout = ["parallel.tensor=8", "parallel.pipeline=16"]
    begun = time.perf_counter()
    assert launch.main(["+model=70b", "world_size=4096", *layout, "dry_run=true"]) == 0
    assert time.perf_counter() - begun < 60
    shown = capsys.readouterr().out
    assert "503,398,400" in shown and "free of deadlock" in shown and "H100" in shown
    assert "TFLOP/s a rank" in shown and "989" in shown  # of a GPU's bf16: nothing was said of precision


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "words",
    [
        ["+model=7b", "parallel.tensor=2"],
        ["+model=llama3-8b", "parallel.tensor=2", "parallel.sequence=true"],
        ["+model=llama3-8b", "parallel.context=2"],
        ["+model=llama3-8b", "parallel.pipeline=2"],
    ],
    ids=" ".join,
)
def test_the_dry_run_keeps_the_activations_that_the_plan_foretells(words, recompute):
    config = compose_config([*words, "precision=bf16", f"parallel.recompute={recompute}"])
    resolve(config, 4)
    planned = plan(config, make_planned_machine("h100", 4)).as_dict()["memory"]["stages"][0]
    counted = describe_ranks(config).stages[0].activation_bytes
    assert counted == pytest.approx(planned["activations_bytes"] + planned["logits_bytes"], rel=0.1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (8, 3, 1)),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            (16, 5, 5),
        ),
    ],
)
def test_other_launchers_are_understood(environment, expected):
    world = find_world(Config(), environment)
    assert (world.size, world.rank, world.local_rank) == expected and world.external


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x", "WORLD_SIZE": "8"},
        {"SLURM_PROCID": "5", "SLURM_NTASKS": "16"},
    ],
)
def test_incomplete_variables_of_a_launcher_are_refused(environment):
    with pytest.raises(ConfigError):
        find_world(Config(), environment)


def start(*arguments: str, **options) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-m", "megalm.launch", *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_local_ranks_are_as_many_as_there_are_gpus_at_most(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert find_world(Config(), {}).size == 2 and find_world(Config(world_size=1), {}).size == 1
    assert find_world(Config(world_size=3, device="cpu"), {}).size == 3
    with pytest.raises(ConfigError, match="torch sees 2 GPUs here"):
        find_world(Config(world_size=3), {})


def test_two_local_ranks_are_interrupted_and_go_on(tmp_path):
    """Ctrl-C reaches every process of the terminal; the run saves, exits with 130, and the same command ends it."""
    arguments = [*small_run(tmp_path), "world_size=2", "train.steps=400", "train.eval_every=0", "checkpoint.every=0"]
    folder = tmp_path / "runs/small"
    first = start(*arguments)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    shown, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    before = len(losses(folder))
    assert f"saved at step {before} of 400" in shown
    assert 0 < before < 400 and (folder / f"checkpoints/step-{before:08d}").is_dir()

    second = start(*arguments)
    shown, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert f"resumed at step {before}" in shown and len(losses(folder)) == 400
    for name in ("config.yaml", "plan.json", "events.jsonl", "report.html", "tensorboard", "logs/rank-1.log"):
        assert (folder / name).exists(), name
    assert "measured" in json.loads((folder / "plan.json").read_text())
    assert "<svg" in (folder / "report.html").read_text()


def test_a_finished_run_says_so(tmp_path):
    arguments = small_run(tmp_path, "train.steps=2")
    assert launch.main(arguments) == 0
    again = start(*arguments)
    shown, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "complete" in shown


def test_a_run_of_another_model_is_refused_before_its_folder_is_touched(tmp_path, capsys):
    arguments = small_run(tmp_path, "train.steps=1")
    assert launch.main(arguments) == 0
    (config,) = tmp_path.glob("**/config.yaml")
    before = config.read_text()
    assert launch.main([*arguments, "model.ffn_hidden_size=24", "train.steps=2"]) == 2
    said = capsys.readouterr().err
    assert "was made with other settings" in said and "model.ffn_hidden_size: 64 in the checkpoint, 24 now" in said
    assert "allow_changes" not in said  # no key makes other tensors fit
    assert config.read_text() == before
    state = CheckpointReader(config.parent).state()  # what a checkpoint was trained with goes with it
    assert make_config(state["config"], "here").model == load_config(config).model


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_refused_start_leaves_the_run_as_it_was(tmp_path, capsys, ranks):
    arguments = small_run(tmp_path, "train.steps=1", f"world_size={ranks}")
    assert launch.main(arguments) == 0
    (folder,) = (path.parent for path in tmp_path.glob("**/config.yaml"))
    before = {name: (folder / name).read_text() for name in ("config.yaml", "plan.json")}
    assert launch.main([*arguments, "data.shuffle_window=64", "train.steps=2"]) == 2
    assert "data.shuffle_window: 0 in the checkpoint, 64 now" in capsys.readouterr().err
    assert {name: (folder / name).read_text() for name in before} == before
