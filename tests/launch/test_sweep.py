"""Several runs from one command line: which ones, and what they are called."""

import pytest

from megalm.config import ConfigError
from megalm.launch.options import read_options
from megalm.launch.sweep import expand


def names(*words):
    return [run.name for run in expand(words)[1]]


def test_every_combination_is_a_run():
    shared, runs = expand(["+model=tiny", "optim.lr=1e-3,2e-3", "train.seed=range(1,4)", "train.steps=5"])
    assert shared == ["+model=tiny", "train.steps=5"]
    assert len(runs) == 6 and runs[1].differing == {"optim.lr": "1e-3", "train.seed": "2"}
    assert runs[0].name == "lr-1e-3_seed-1"


@pytest.mark.parametrize(
    "word, expected",
    [
        ("optim=adamw,sgd", ["optim-adamw", "optim-sgd"]),
        ("+model=tiny,125m", ["model-tiny", "model-125m"]),
        ("optim.betas=[0.9,0.95],[0.9,0.99]", ["betas-0.9-0.95", "betas-0.9-0.99"]),
        ("run.x='a,b',c", ["x-a-b", "x-c"]),
        ("data.train=data/a_text,other/b_text", ["train-a_text".replace("_", "-"), "train-b-text"]),
        ("train.seed=range(10,0,-5)", ["seed-10", "seed-5"]),
    ],
)
def test_what_counts_as_several_values(word, expected):
    assert names("x=1", word) == expected


@pytest.mark.parametrize("word", ["data.train=[a,b]", "run.name='a,b'", "x={a: 1, b: 2}"])
def test_commas_in_brackets_and_quotation_marks_are_one_value(word):
    assert expand([word, "train.seed=1,2"])[0] == [word]


@pytest.mark.parametrize(
    "words, said",
    [
        (["train.seed=1"], "no word has several"),
        (["train.seed=1,,2"], "a value is empty"),
        (["train.seed=1,2", "train.seed=3,4"], "varies twice"),
        (["train.seed=range(3,3)"], "holds no number"),
        (["train.seed=range(0,2000)"], "2000 runs"),
        (["run.x=a/b,c/b"], "one name"),
    ],
)
def test_what_makes_no_sweep_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        expand(words)


def test_options_are_taken_out():
    options = read_options(["-m", "+model=tiny", "--jobs", "3", "optim.lr=1,2"])
    assert (options.several, options.jobs, options.words) == (True, 3, ["+model=tiny", "optim.lr=1,2"])
    assert read_options(["--cfg", "job", "+model=tiny"]).words == ["+model=tiny"]
    assert read_options(["--cfg", "+model=tiny"]).words == ["+model=tiny"]
    with pytest.raises(ConfigError, match="whole number from 1"):
        read_options(["-m", "--jobs=0"])
