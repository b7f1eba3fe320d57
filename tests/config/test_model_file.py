"""`+model=PATH.yaml`."""

import pytest

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.config.model_file import write_model_yaml
from megalm.config.saved import write_config_yaml


@pytest.mark.parametrize("name", ["tiny", "llama3-8b", "qwen3-0.6b", "gpt2-124m", "30b"])
def test_a_model_written_to_a_file_comes_back(name, tmp_path):
    expected = compose_config([f"+model={name}"]).model
    (tmp_path / "model.yaml").write_text(write_model_yaml(expected))
    assert compose_config([f"+model={tmp_path}/model.yaml"]).model == expected
    (tmp_path / "config.yaml").write_text(write_config_yaml(compose_config([f"+model={name}"])))
    assert compose_config([f"model={tmp_path}/config.yaml"]).model == expected


def test_what_comes_after_the_file_wins(tmp_path):
    (tmp_path / "m.yml").write_text(
        "num_layers: 2\nhidden_size: 64\nnum_heads: 4\nvocab_size: 100\nseq_length: 32\nnorm_eps: 1.0e-06\n"
        "name: it's a \\ name\nrope_scaling:\n  kind: linear\n  factor: 2.0\n"
    )
    model = compose_config([f"+model={tmp_path}/m.yml", "model.seq_length=16", "model.rope_scaling.factor=4"]).model
    assert (model.num_layers, model.seq_length, model.norm_eps, model.name) == (2, 16, 1e-6, "it's a \\ name")
    assert (model.rope_scaling.kind, model.rope_scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("num_layer: 2", "unknown key model.num_layer. Did you mean 'num_layers'?"),
        ("rope_scaling: {kid: linear}", "unknown key model.rope_scaling.kid"),
        ("- a", "holds no keys of a model"),
        ("a: [", "not yaml"),
        ("num_layers: many", "model.num_layers"),
    ],
)
def test_mistakes_name_the_file_or_the_key(text, said, tmp_path):
    if text is not None:
        (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        compose_config([f"+model={tmp_path}/m.yaml"])
    assert said in str(refused.value)
