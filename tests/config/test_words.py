"""What a word of the command line or of a yaml file means: its field decides, never its looks."""

from dataclasses import replace

import pytest

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.config.groups import find_conf_dir
from megalm.config.model_file import write_model_yaml
from megalm.config.saved import load_config, write_config_yaml


def value_of(word: str, *more: str):
    node = compose_config(["+model=tiny", word, *more])
    for part in word.lstrip("+").partition("=")[0].strip().split("."):
        node = getattr(node, part)
    return node


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as refused:
        compose_config(["+model=tiny", *words])
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    foreign = ("ListConfig", "DictConfig", "Optional", "type hint", "convert", "override", "Ambiguous", "Traceback")
    assert not any(word in message for word in foreign), message
    return message


NAMES = [
    "12e4567", "3e563", "1e5", "1_000", "1.10", "true", "off", "007", "0x1f", ".5", "inf", "nan", "2026-11-30", "12:30:45", "1,5",
    "exp=1", "a#b", "naïve", "日本", "a(b)", "it's", "a b", "-x", "~x", "a/b", "100%", "deadbeef", "5e3", "No", "[1]a", "a:b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_what_was_typed(name, tmp_path):
    config = compose_config(["+model=tiny", f"run.name={name}", f"data.tokenizer={name}"])
    assert (config.run.name, config.data.tokenizer) == (name, name)
    (tmp_path / "config.yaml").write_text(write_config_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", ["12e4567", "1.10", "true", "1_000", "0x1f", "null", "2026-11-30"])
def test_a_text_of_a_yaml_file_is_what_was_typed(name, tmp_path):
    written = f"'{name}'" if name == "null" else name
    (tmp_path / "m.yaml").write_text(
        f"name: {written}\nnum_layers: 2\nhidden_size: 64\nnum_heads: 4\nvocab_size: 1_000\nseq_length: 32\nnorm_eps: 1e-6\n"
    )
    model = compose_config([f"+model={tmp_path}/m.yaml"]).model
    assert (model.name, model.vocab_size, model.norm_eps) == (name, 1000, 1e-6)
    (tmp_path / "again.yaml").write_text(write_model_yaml(model))
    assert compose_config([f"+model={tmp_path}/again.yaml"]).model == model


def test_an_experiment_keeps_its_texts(tmp_path, monkeypatch):
    experiment = (
        "# @package _global_\nrun: {name: 3e563}\ndata: {train: data/1e5, tokenizer: null}\noptim: {lr: 1e-3}\n"
    )
    for file in find_conf_dir().rglob("*.yaml"):
        copy = tmp_path / file.relative_to(find_conf_dir())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    (tmp_path / "experiment/mine.yaml").write_text(experiment)
    for module in ("compose", "groups"):
        monkeypatch.setattr(f"megalm.config.{module}.find_conf_dir", lambda: tmp_path)
    config = compose_config(["+model=tiny", "+experiment=mine"])
    assert (config.run.name, config.data.train, config.data.tokenizer) == ("3e563", ["data/1e5"], None)
    assert config.optim.lr == 1e-3


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.train=data/mine", ["data/mine"]),
        ("data.train=[1e5,true,1.10]", ["1e5", "true", "1.10"]),
        (
            "data.train=[./a (1)_text,./b[2]_text,./c=d,it's,日本]",
            ["./a (1)_text", "./b[2]_text", "./c=d", "it's", "日本"],
        ),
        ("data.train=['./a (1)_text']", ["./a (1)_text"]),
        ("data.train=./a (1)[2]=3_text", ["./a (1)[2]=3_text"]),
        ('data.train=["a,b",c]', ["a,b", "c"]),
        ("data.train=[]", []),
        ("data.weights=1", [1.0]),
        ("data.weights=[1,0.5]", [1.0, 0.5]),
        ("guard.snapshot_lags=16", [16]),
        ("optim.betas=[0.9,0.999]", (0.9, 0.999)),
        ("data.tokenizer=null", None),
        ("data.tokenizer='null'", "null"),
        ('run.name="it\'s"', "it's"),
        (r"run.name=a\=b", "a=b"),
        ("run.name=${model.name}-${train.seed}", "tiny-1234"),
        (r"run.name=\${x}", "${x}"),
        ("train.steps=1e3", 1000),
        ("train.steps=1_000", 1000),
        ("train.steps = 7", 7),
        ("train.sample=off", False),
        ("data.split=969,30,1", "969,30,1"),
        ("cluster.peak_tflops={bf16: 300}", {"bf16": 300.0}),
    ],
)
def test_values_are_read_by_their_fields(word, value):
    assert value_of(word) == value


def test_names_of_a_mixture_are_texts():
    phase = "{name: 1e5, steps: 3, mixture: {1e5: 0.7, s3://b/x: 30%, 'a: b': 2x}}"
    for word in (f"data.phases=[{phase}]", f"data.phases={phase}"):
        (read,) = compose_config(["+model=tiny", word]).data.phases
        assert read.name == "1e5" and read.mixture == {"1e5": 0.7, "s3://b/x": "30%", "a: b": "2x"}


def test_an_item_of_a_list_can_be_set():
    config = compose_config(
        ["+model=tiny", "guard.rungs.0.budget=7", "guard.provoke={kind: lr_jump}", "guard.provoke.step=9"]
    )
    default = compose_config(["+model=tiny"]).guard
    assert config.guard.rungs == [replace(default.rungs[0], budget=7), *default.rungs[1:]]
    assert (config.guard.provoke.kind, config.guard.provoke.step) == ("lr_jump", 9)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("run.name=", "run.name is empty"),
        ("run.name=null", "\"run.name='null'\""),
        ("run.name=[a]", "\"run.name='[a]'\""),
        ("run.name='it's", "\"run.name='\\'it\\'s'\""),
        ("run.name=..", "a folder within run.dir"),
        ("run.name=/tmp/x", "a folder within run.dir"),
        ("run.dir=", "run.dir is empty"),
        ("run.name=${nope}", "run.name: what stands in ${...}"),
        ("data.tokenizer=None", "data.tokenizer=null"),
        ("data.train=a,b", '"data.train=[a,b]"'),
        ("data.train=[a,,b]", "an item is empty"),
        ("data.train=null", "a list of texts"),
        ("data.weights=1,2", '"data.weights=[1,2]"'),
        ("data.weights={a: 1}", "a number is needed"),
        ("optim.betas=0.9", "a list of 2 values, such as [0.9, 0.95]"),
        ("train.steps=1,000", "Write it without separators: 1000"),
        ("train.steps=\u22125", "write -5"),
        ("train.steps=5k", "Write 5e3"),
        ("train.steps=true", "a whole number is needed"),
        ("train.steps={a: 1}", "a whole number is needed"),
        ("train.steps=\u0663", "a whole number is needed"),
        ("train.steps=", "train.steps is empty"),
        ("optim.lr=0,1", "Write a point for the decimals: 0.1"),
        ("train.sample=[true]", "true or false is needed"),
        ("train=3", "a group of keys"),
        ("guard.rungs=skip", "a group of keys"),
        ("guard.rungs.9.budget=3", "the list has 7 items"),
        ("guard.provoke={kid: lr_jump}", "Did you mean 'guard.provoke.kind'"),
        ("guard=null", "Choices: default, fp8, off"),
        ("~guard", "Choose one: default, fp8, off"),
        ("~train.steps", "cannot be taken away"),
        ("+invented=3", "unknown key 'invented'"),
        ("learning_rate=3", "Did you mean 'optim.lr'"),
        ("optim.maxLr=3", "Did you mean 'optim.lr'"),
        ("lr=3", "Did you mean 'optim.lr'"),
        ("batch_size=8", "Did you mean 'train.global_batch_size'"),
        ("tensor_parallel=2", "Did you mean 'parallel.tensor'"),
        ("train.step=3", "Did you mean 'train.steps'"),
        ("--lr=3", "Did you mean optim.lr=3?"),
        ("--global-batch-size=8", "Did you mean train.global_batch_size=8?"),
        ("-m", "It stands first"),
        ("tiny", "Did you mean +model=tiny?"),
        ("train.steps:100", "Did you mean train.steps=100?"),
        ("model=7b", "give one of them"),
        ("=3", "write key=value"),
        ("model@other=tiny", "write key=value"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_our_words(word, said):
    assert said in refusal(word)


def test_an_option_is_answered_with_its_value():
    assert "Did you mean optim.lr=3?" in refusal("--lr", "3")


def test_of_two_ways_to_say_one_thing_the_command_line_counts():
    warmup = compose_config(["+model=tiny", "+experiment=warmup", "train.tokens=1e6"])
    assert warmup.train.steps is None and warmup.train.tokens == 1e6
    first = compose_config(["+model=tiny", "+experiment=first", "optim.min_lr=1e-4"])
    assert first.optim.min_lr == 1e-4
    assert "give one of them" in refusal("train.steps=3", "train.tokens=1e6")


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "a: [\n", "? [1]\n: 2\n"])
def test_yaml_that_cannot_be_meant_names_its_line(text, tmp_path):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not yaml, line"):
        compose_config([f"+model={tmp_path}/m.yaml"])
