"""Layers that predict further tokens: exported, they compute in transformers what they compute here, and come back bit by bit."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.convert.formats import open_source
from megalm.convert.huggingface import write_folder
from megalm.convert.source import Source
from megalm.data.batch import Batch
from megalm.generate.model import build_model, fill_weights
from megalm.model.transformer import Transformer
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import list_boxes

transformers = pytest.importorskip("transformers")

SMALL = [
    "+model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.ffn_hidden_size=48",
    "model.vocab_size=96", "model.seq_length=64", "model.position=rope", "model.norm_eps=1e-6", "model.moe.num_experts=8",
    "model.moe.top_k=3", "model.moe.ffn_hidden_size=24", "model.moe.num_shared_experts=1", "model.moe.first_dense=1",
    "model.moe.weight_scale=1.5", "model.prediction.depth=2", "model.tie_embeddings=false",
]  # fmt: skip
FAMILIES = {
    "deepseek_v3": [
        "model.rope_interleaved=true", "model.num_kv_heads=4", "model.moe.groups=4", "model.moe.top_groups=2",
        "model.latent={key_rank: 16, query_rank: 24, plain_dim: 8, rope_dim: 8, value_dim: 12}",
    ],
    "glm4_moe": ["model.num_kv_heads=2", "model.rope_fraction=0.5", "model.qkv_bias=true", "model.norm_eps=1e-5"],
}  # fmt: skip


class Weights:
    """Tensors in memory, as a conversion reads them."""

    def __init__(self, model):
        self.tensors = {box.name: box.tensor for box in list_boxes(model)}

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name):
        return self.tensors[name].clone()


def export(family, folder):
    """A random model of the family, written for transformers."""
    config = compose_config([*SMALL, *FAMILIES[family]]).model
    model = Transformer(config, LayerContext(Mesh.single()))
    torch.manual_seed(1)
    for box in list_boxes(model):
        norm = "norm" in box.name
        torch.nn.init.normal_(box.tensor, 1.0 if norm else 0.0, 0.3 if norm else 0.2)
    folder.mkdir()
    write_folder(Source(folder, "megalm", config, Weights(model), 0), folder)
    return model


def predict(model, batch):
    """Logits of each depth, [B, S, V]: what is trained, without the loss."""
    where = model.positions(batch)
    state = model.head.final_norm(model.run_layers(model.embed(batch), batch))
    found, tokens = [], batch.labels
    for layer in model.predictions:
        state = layer(state, model.embedding(tokens.t()), where)
        found.append(F.linear(state, model.head.weight).transpose(0, 1))
        tokens = torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_predicts_the_same(family, tmp_path, monkeypatch):
    from transformers.modeling_layers import MtpModel

    # it knows such layers by the numbers that they have in the published models
    monkeypatch.setattr(
        MtpModel, "get_mtp_weights_regex", staticmethod(lambda main: re.compile(r"model\.layers\.[23]\."))
    )
    ours = export(family, tmp_path / family)
    assert json.loads((tmp_path / family / "config.json").read_text())["model_type"] == family
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32)
    peer = MtpModel.from_pretrained(main)
    tokens = torch.randint(96, (1, 21), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    with torch.no_grad():
        state = main.model(batch.tokens).last_hidden_state
        wanted, ahead = [], batch.labels
        for layer in range(2):
            state = peer.forward_layer(layer, state, torch.arange(20)[None], None, input_ids=ahead)
            wanted.append(main.lm_head(state))
            ahead = torch.cat([ahead[:, 1:], ahead[:, -1:]], 1)
        found = predict(ours, batch)
    for depth in range(2):
        assert wanted[depth].std() > 0.5
        torch.testing.assert_close(found[depth], wanted[depth], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_read_again_bit_by_bit(family, tmp_path):
    ours = export(family, tmp_path / family)
    source = open_source(tmp_path / family)
    assert source.model.prediction.depth == 2
    assert set(source.ignored) == {
        f"model.layers.{n}.{t}.weight" for n in (2, 3) for t in ("embed_tokens", "shared_head.head")
    }
    assert all(reason.endswith("again") for reason in source.ignored.values())
    again = Transformer(source.model, LayerContext(Mesh.single()))
    fill_weights(again, source.weights)
    theirs = {box.name: box.tensor for box in list_boxes(again)}
    for box in list_boxes(ours):
        assert torch.equal(theirs[box.name], box.tensor), box.name
    assert not len(build_model(source.model, source.weights).predictions)  # generation leaves them out


def test_files_without_such_layers_are_a_model_without_them(tmp_path):
    export("glm4_moe", tmp_path / "whole")
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    main.save_pretrained(tmp_path / "bare")  # transformers leaves them out, and counts them in config.json
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    source = open_source(tmp_path / "bare")
    assert source.model.prediction.depth == 0
    assert any("the files have none" in note for note in source.notes)
    (tmp_path / "out").mkdir()
    write_folder(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_table_that_differs_from_the_models_is_told(tmp_path):
    export("deepseek_v3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, file)
    reasons = open_source(tmp_path / "model").ignored
    assert reasons["model.layers.2.embed_tokens.weight"].endswith("from which it differs")
    assert reasons["model.layers.3.embed_tokens.weight"].endswith("again")


def test_a_layer_that_lacks_a_tensor_is_refused(tmp_path):
    export("deepseek_v3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.eh_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"model\.layers\.3\.eh_proj\.weight"):
        open_source(tmp_path / "model")


def test_a_family_without_such_layers_is_no_target(tmp_path):
    config = compose_config(
        ["+model=tiny", "model.num_layers=2", "model.prediction.depth=1", "model.position=rope"]
    ).model
    model = Transformer(config, LayerContext(Mesh.single()))
    with pytest.raises(ConfigError, match=r"cannot express model\.prediction="):
        write_folder(Source(tmp_path, "megalm", config, Weights(model), 0), tmp_path / "out")
