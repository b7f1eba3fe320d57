"""Composing a configuration: what is accepted, and that each mistake becomes one message that says what to do."""

import ast
from pathlib import Path

import pytest

import megalm.config
from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.config.groups import list_groups
from megalm.config.saved import load_config, write_config_yaml
from megalm.launch.resolve import resolve_batch, resolve_length

MPT_SHAPES = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 64),
    "70b": (80, 8192, 64),
}


def test_values_are_typed_and_filled_in():
    config = compose_config(["+model=tiny", "train.steps=3", "optim.lr=1e-3", "parallel=zero1"])
    assert (config.train.steps, config.optim.lr, config.parallel.zero_stage) == (3, 1e-3, 1)
    assert config.model.num_kv_heads == 2 and config.model.head_dim == 64


def test_the_plus_before_model_may_be_left_out():
    assert compose_config(["model=tiny"]).model == compose_config(["+model=tiny"]).model


@pytest.mark.parametrize(("name", "shape"), MPT_SHAPES.items())
def test_mpt_shapes(name, shape):
    model = compose_config([f"+model={name}"]).model
    assert (model.num_layers, model.hidden_size, model.num_heads) == shape
    assert model.position == "alibi" and not model.linear_bias and model.ffn_hidden_size == 4 * model.hidden_size
    if name == "30b":
        assert (model.seq_length, model.vocab_size) == (8192, 50432)


def test_every_model_composes():
    assert {"tiny", "llama3-8b", "llama3-70b", "gpt2-124m", *MPT_SHAPES} <= set(list_groups()["model"])
    for name in list_groups()["model"]:
        compose_config([f"+model={name}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", ["train.stepz", "'train.steps'", "global_batch_size"]),
        ("+invented=3", ["invented"]),
        ("train.steps=abc", ["train.steps=abc", "a whole number is needed"]),
        ("optim.betas=[a,b]", ["optim.betas[0]=a", "a number is needed"]),
        ("model.num_heads=7", ["hidden_size=256", "num_heads=7", "4, 8"]),
        ("model.num_kv_heads=3", ["num_kv_heads=3"]),
        ("optim.schedule=sawtooth", ["sawtooth", "cosine", "wsd"]),
        ("parallel=zero9", ["zero9", "zero1"]),
        ("optim.min_lr=1", ["min_lr=1", "optim.lr"]),
        ("model.dropout=1.5", ["dropout=1.5"]),
        ("train.micro_batch_size=-1", ["micro_batch_size=-1", "positive"]),
        ("world_size=-1", ["world_size=-1"]),
        ("just words", ["key=value"]),
    ],
)
def test_a_mistake_is_one_message(override, said):
    with pytest.raises(ConfigError) as caught:
        compose_config(["+model=tiny", override])
    message = str(caught.value)
    assert all(words in message for words in said), message
    assert "Traceback" not in message and len(message.splitlines()) == 1


def test_unknown_model_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        compose_config(["+model=tinny"])


def test_a_shape_without_a_model_says_what_is_missing():
    with pytest.raises(ConfigError, match="model"):
        compose_config(["train.steps=3"])


def test_resolved_yaml_reads_back_the_same(tmp_path):
    config = compose_config(["+model=llama3-8b", "train.tokens=1e9", "checkpoint.async=false"])
    (tmp_path / "config.yaml").write_text(write_config_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_length_from_tokens_steps_or_parameters():
    by_tokens = compose_config(["+model=tiny", "train.tokens=1e6"])
    resolve_length(by_tokens)
    assert by_tokens.train.steps == -(-1_000_000 // 8192)
    by_size = compose_config(["+model=tiny"])
    resolve_length(by_size)
    assert by_size.train.tokens == pytest.approx(20 * 4_999_424, rel=1e-3)


@pytest.mark.parametrize(("batch", "micro", "data"), [(10, 4, 1), (8, 4, 4)])
def test_batches_that_do_not_divide(batch, micro, data):
    config = compose_config(["+model=tiny", f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"])
    config.parallel.data = data
    with pytest.raises(ConfigError, match=f"global_batch_size={batch}"):
        resolve_batch(config)


def test_every_field_has_a_docstring():
    folder = Path(megalm.config.__file__).parent
    fields = 0
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
                continue
            for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert documented, f"{node.name}.{ast.unparse(statement.target)} has no docstring"
                    fields += 1
    assert fields > 80


@pytest.mark.parametrize(
    "text",
    [b"", b"\0" * 100, b"model: [1,\nb", b"model:\n  name: ti\n tr", b"\xff\xfe\x00", b"- 1\n- 2\n", b"3", b"a: {b"],
    ids=repr,
)
def test_a_damaged_file_of_a_run_is_one_message_with_the_way_out(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"config.yaml is damaged: .* Move it away") as refusal:
        load_config(file)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["nothing/config.yaml", "plain/config.yaml"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    (tmp_path / "plain").touch()
    with pytest.raises(ConfigError, match="is not there"):
        load_config(tmp_path / name)
