"""Code of a user's own: every example of docs/extending.md is written to a folder, and runs as a user would run it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.journal import read_course
from tests.small_run import small_run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = dict(
    re.findall(r"```python\n# (mine/\w+\.py)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
)
ALL = ["lion", "bilinear", "sharpened", "goal", "numbers", "table", "wide"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with the package `mine` in it."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine").mkdir()
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)
    return folder


def megalm(folder, *words, **environment):
    """`megalm WORDS` in the user's folder."""
    return subprocess.run(
        [sys.executable, "-m", "megalm", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def words_of(folder, name, *more):
    words = [word for word in small_run(folder) if not word.startswith(("run.name", "data.train", "optim."))]
    named = ",".join(f"mine.{module}" for module in ALL)
    return ["train", *words, f"run.name={name}", f"run.plugins=[{named}]", "optim.name=lion", "optim.lr=1e-3",
            "model.blocks={mlp: bilinear}", "objective.name=sharpened", "objective.options={weight: 0.5}",
            "data.train=[numbers://97]", "tracking.trackers=[table]", "ops.attention=wide", *more]  # fmt: skip


@pytest.fixture(scope="module")
def run(folder):
    done = megalm(folder, *words_of(folder, "one", "run.plugin_options={goal: -1}"))
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "runs" / "one"


def losses(run):
    return [step["loss"] for step in read_course(run / "metrics.jsonl").steps]


def test_all_examples_are_of_this_page():
    assert {Path(name).stem for name in EXAMPLES} == {*ALL, "family", "arrays"}


def test_what_plugins_add_is_what_trains(run):
    steps = read_course(run / "metrics.jsonl").steps
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"]
    assert [step["to_goal"] for step in steps] == pytest.approx([step["loss"] + 1 for step in steps])
    table = [line.split(",") for line in (run / "loss.csv").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in table] == [(step["step"], step["loss"]) for step in steps]
    assert "mine.lion" in (run / "config.yaml").read_text()


def test_plugins_run_on_two_ranks_with_the_same_loss(folder, run):
    done = megalm(folder, *words_of(folder, "two", "world_size=2", "parallel.tensor=2"))
    assert done.returncode == 0, done.stderr + done.stdout
    assert losses(folder / "runs" / "two") == pytest.approx(losses(run), rel=1e-4)


def test_a_hook_of_a_plugin_ends_the_run_and_it_goes_on(folder):
    words = words_of(folder, "goal", "run.plugin_options={goal: 100}")
    stopped = megalm(folder, *words)
    assert stopped.returncode == 130 and len(losses(folder / "runs" / "goal")) == 2  # the ranks agree on it in the next
    done = megalm(folder, *words_of(folder, "goal"))
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(losses(folder / "runs" / "goal")) == 6


def test_a_finished_run_finds_its_plugins_again_and_is_exported(folder, run):
    done = megalm(folder, "convert", str(run), "exported", "--to", "arrays", MEGALM_PLUGINS="mine.arrays")
    assert done.returncode == 0, done.stderr
    again = megalm(folder, "convert", "exported", "back", "--to", "megalm", MEGALM_PLUGINS="mine.arrays,mine.bilinear")
    assert again.returncode == 0, again.stderr
    refused = megalm(folder, "convert", "exported", "other", "--to", "megalm")
    assert refused.returncode == 2 and "neither a run of megalm's" in refused.stderr


def test_a_family_of_a_plugin_is_read(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder / "ours")
    config = json.loads((folder / "ours" / "config.json").read_text())
    (folder / "ours" / "config.json").write_text(json.dumps({**config, "model_type": "ourllama"}))
    assert "model_type='ourllama' is not supported" in megalm(folder, "convert", "ours", "not", "--to", "megalm").stderr
    done = megalm(folder, "convert", "ours", "read", "--to", "megalm", MEGALM_PLUGINS="mine.family")
    assert done.returncode == 0, done.stderr


def test_an_installed_package_joins_in_by_its_entry_point(folder):
    package = folder / "site" / "theirs-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[megalm.plugins]\nlion = mine.lion\n")
    words = ["train", "+model=tiny", "optim.name=lion", "--cfg", "job"]
    assert "not one of adamw, sgd, muon" in megalm(folder, *words).stderr
    found = megalm(folder, *words, PYTHONPATH=f"{ROOT}:{folder / 'site'}")
    assert found.returncode == 0 and "name: lion" in found.stdout


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "there is no module mine.broken. Install its package, or start in the folder that holds it"),
        ("import nothing_of_this_name", "it needs nothing_of_this_name, which is not installed"),
        ("x = 1\ny = x / 0", "broken.py, line 2: ZeroDivisionError: division by zero"),
        ("from megalm import plugins\nplugins.register_rul", "megalm.plugins has no 'register_rul'. There are: "),
        (
            "from megalm import plugins\nfrom megalm.optim.rules import SGD\nplugins.register_rule('adamw', SGD)",
            "update rule 'adamw' is there already: register yours under another name",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_said_in_a_sentence(folder, text, said):
    if text is not None:
        (folder / "mine" / "broken.py").write_text(text)
    refused = megalm(folder, "train", "+model=tiny", "run.plugins=[mine.broken]")
    assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith("error: run.plugins=[mine.broken]: ")


@pytest.mark.parametrize(
    "words, said",
    [
        (["tracking.trackers=[tabel]"], "tracking.trackers=tabel: there is no such tracker"),
        (["model.blocks={mlp: bilinear}"], "model.blocks.mlp=bilinear: there is no such block"),
        (["model.blocks={mpl: bilinear}"], "model.blocks.mpl: there is no such sublayer. Known are attention, mlp"),
        (["optim.name=lion"], "optim.name=lion: not one of adamw, sgd, muon"),
    ],
)
def test_a_name_that_no_plugin_registered_is_refused(folder, words, said):
    usual = [word for word in small_run(folder) if not word.startswith(("data.train", "run.name"))]
    numbers = ["data.train=[numbers://97]", "run.plugins=[mine.numbers]"]
    refused = megalm(folder, "train", *usual, *numbers, "run.name=refused", *words)
    assert refused.returncode == 2 and said in refused.stderr, refused.stderr
