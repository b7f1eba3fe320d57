"""Configurations of one's own: a folder beside the run, of $MEGALM_CONF, of --config-dir; a file by its path."""

import pytest

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.config.groups import VARIABLE, find_own_files, find_search_path, list_groups

MODEL = "num_layers: 3\nhidden_size: 48\nnum_heads: 3\nvocab_size: 100\nseq_length: 16\n"


def write(folder, name, text):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_folder_conf_beside_the_run_adds_choices(tmp_path):
    write(
        tmp_path,
        "conf/model/mine.yaml",
        MODEL,
    )
    write(tmp_path, "conf/experiment/short.yaml", "train: {steps: 7}\noptim: {lr: 0.5}\n")
    config = compose_config(["+model=mine", "+experiment=short"])
    assert (config.model.num_layers, config.train.steps, config.optim.lr) == (3, 7, 0.5)
    assert "mine" in list_groups()["model"] and "tiny" in list_groups()["model"]


def test_the_nearer_folder_wins(tmp_path, monkeypatch):
    write(tmp_path, "conf/optim/adamw.yaml", "name: adamw\nlr: 1e-1\n")
    write(tmp_path, "team/optim/adamw.yaml", "name: adamw\nlr: 1e-2\n")
    write(tmp_path, "now/optim/adamw.yaml", "name: adamw\nlr: 1e-3\n")
    assert compose_config(["+model=tiny"]).optim.lr == 1e-1
    monkeypatch.setenv(VARIABLE, "team")
    assert compose_config(["+model=tiny"]).optim.lr == 1e-2
    assert compose_config(["+model=tiny", "--config-dir", "now"]).optim.lr == 1e-3
    assert compose_config(["--config-dir=now", "+model=tiny"]).optim.lr == 1e-3
    monkeypatch.delenv(VARIABLE)
    monkeypatch.chdir(tmp_path / "now")
    assert compose_config(["+model=tiny"]).optim.lr not in (1e-1, 1e-2, 1e-3)
    assert find_own_files({"optim": "adamw"}) == {}


def test_what_is_no_group_of_ours_is_left_alone(tmp_path):
    write(tmp_path, "conf/config.yaml", "defaults:\n  - nowhere: x\n")
    write(tmp_path, "conf/webserver/tiny.yaml", "port: 80\n")
    assert compose_config(["+model=tiny"]).train.seed == 1234
    assert find_own_files({"model": "tiny"}) == {}


def test_own_files_are_named(tmp_path):
    file = write(
        tmp_path,
        "conf/model/tiny.yaml",
        MODEL,
    )
    assert {k: v.resolve() for k, v in find_own_files({"model": "tiny", "optim": "adamw"}).items()} == {
        "model=tiny": file
    }


@pytest.mark.parametrize("text", ["train: [a]\nweights: [2]\n", "data: {train: [a], weights: [2]}\n"])
def test_a_file_by_its_path(tmp_path, text):
    write(tmp_path, "mix.yaml", text)
    config = compose_config(["+model=tiny", "data=mix.yaml"])
    assert (config.data.train, config.data.weights) == (["a"], [2.0])


def test_an_experiment_by_its_path_may_choose_among_groups(tmp_path):
    write(tmp_path, "e.yaml", "defaults:\n  - override /optim: sgd\n  - _self_\ntrain: {steps: 3}\n")
    config = compose_config(["+model=tiny", "+experiment=e.yaml", "train.seed=5"])
    assert (config.optim.name, config.train.steps, config.train.seed) == ("sgd", 3, 5)
    write(tmp_path, "e.yaml", "# @package _global_\ntrain: {steps: 44}\n")
    assert compose_config(["+model=tiny", "+experiment=e.yaml"]).train.steps == 44


@pytest.mark.parametrize(
    "words, said",
    [
        (["data=nowhere.yaml"], "data=nowhere.yaml: there is no such file"),
        (["--config-dir"], "is no folder"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: is no folder"),
        (["+experiment=bad.yaml"], "unknown key"),
        (["optim=torn.yaml"], "torn.yaml"),
        (["optim=list.yaml"], "holds no keys"),
    ],
)
def test_what_is_not_there_or_no_yaml_is_said(tmp_path, words, said):
    write(tmp_path, "bad.yaml", "trian: {steps: 3}\n")
    write(tmp_path, "torn.yaml", "lr: [1\n")
    write(tmp_path, "list.yaml", "- 1\n")
    with pytest.raises(ConfigError, match="(?s).*" + said):
        compose_config(["+model=tiny", *words])


def test_a_variable_that_names_no_folder_is_said(monkeypatch):
    monkeypatch.setenv(VARIABLE, "gone")
    with pytest.raises(ConfigError, match="gone is no folder"):
        find_search_path()
