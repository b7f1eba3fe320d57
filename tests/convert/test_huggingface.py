"""Hugging Face folders in both directions, against models that transformers built."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalm.config import ModelConfig
from megalm.config.errors import ConfigError
from megalm.convert.families import FAMILIES
from megalm.convert.huggingface import open_folder, write_folder
from megalm.convert.huggingface_config import choose_architecture, read_config, write_config
from megalm.convert.huggingface_names import make_huggingface_rules
from megalm.convert.source import Source
from megalm.convert.weight_files import choose_weight_files
from megalm.convert.weights import MemoryWeights
from tests.convert.architectures import NAMES, build, tokens, transformers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each architecture's folder, written by transformers once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_changes_no_bit(folders, name, tmp_path):
    source = open_folder(folders(name))
    assert write_folder(source, tmp_path) == len(load_file(folders(name) / "model.safetensors"))
    before, after = load_file(folders(name) / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype and torch.equal(
            before[key].view(torch.int32), after[key].view(torch.int32)
        ), key


@pytest.mark.parametrize("name", NAMES)
def test_export_without_the_original_config_loads_in_transformers(folders, name, tmp_path):
    """The config.json is written from ModelConfig alone; transformers must then compute the same logits bit for bit, or, where
    another class serves as well (Mistral for Phi-3), but for rounding."""
    source = open_folder(folders(name))
    source.config_json = None
    write_folder(source, tmp_path)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folders(name))(tokens()).logits
        logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits
    kinds = {json.loads((folder / "config.json").read_text())["model_type"] for folder in (folders(name), tmp_path)}
    assert torch.equal(logits, expected) if len(kinds) == 1 else torch.allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_config_survives(folders, name):
    model = read_config(json.loads((folders(name) / "config.json").read_text()))
    assert read_config(write_config(model, preferred=model.name)) == model


def test_sharded_folder(folders, tmp_path):
    """Many small files with an index, read back by us and by transformers."""
    source = open_folder(folders("llama3"))
    write_folder(source, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    again, before = choose_weight_files(tmp_path).open(), load_file(folders("llama3") / "model.safetensors")
    assert set(again.names()) == set(before)
    assert all(torch.equal(again.read(key), before[key]) for key in before)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], before[key]) for key in before)


def test_a_half_copied_folder_is_refused(folders, tmp_path):
    write_folder(open_folder(folders("llama3")), tmp_path, max_shard_bytes=20_000)
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    data = last.read_bytes()
    last.write_bytes(data[:-5])
    with pytest.raises(ConfigError, match="truncated or damaged"):
        open_folder(tmp_path)
    last.unlink()
    with pytest.raises(ConfigError, match=f"lists {last.name}, which is not there"):
        open_folder(tmp_path)


def test_a_tensor_too_many_or_too_few_is_refused(folders, tmp_path):
    tensors = load_file(folders("qwen3") / "model.safetensors")
    (tmp_path / "config.json").write_text((folders("qwen3") / "config.json").read_text())
    save_file({**tensors, "model.layers.0.self_attn.sinks": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="1 tensors have no place in this model: model.layers.0.self_attn.sinks"):
        open_folder(tmp_path)
    save_file(
        {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ConfigError, match="1 tensors are missing: model.layers.1.mlp.up_proj.weight"):
        open_folder(tmp_path)
    save_file({**tensors, "model.norm.weight": torch.zeros(31)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.norm.weight is \[31\], not \[32\]"):
        open_folder(tmp_path)


def test_buffers_bare_names_and_tied_copies(folders, tmp_path):
    """What older folders hold: no `transformer.` prefix, causal masks, the tied matrix a second time."""
    tensors = {
        key.removeprefix("transformer."): value
        for key, value in load_file(folders("gpt2") / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    (tmp_path / "config.json").write_text((folders("gpt2") / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_folder(tmp_path)
    assert set(source.ignored) == {"h.0.attn.bias", "lm_head.weight"}
    assert torch.equal(source.weights.read("layers.1.attention.key.bias"), tensors["h.1.attn.c_attn.bias"][32:64])
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="lm_head.weight differs from wte.weight"):
        open_folder(tmp_path)


def test_old_config_keys(folders, tmp_path):
    """Configs written before transformers 5 keep rotary settings outside `rope_parameters`."""
    config = json.loads((folders("llama3") / "config.json").read_text())
    new = read_config(config)
    rope = config.pop("rope_parameters")
    old = {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    assert read_config(old) == new
    neox = json.loads((folders("pythia") / "config.json").read_text())
    rope = neox.pop("rope_parameters")
    old = {**neox, "rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    assert read_config(old).rope_fraction == 0.25 and read_config(old) == read_config({**neox, "rope_parameters": rope})


def test_pytorch_bin_folder_without_unpickling_code(folders, tmp_path):
    model = build("pythia")
    (tmp_path / "config.json").write_text((folders("pythia") / "config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    source, expected = open_folder(tmp_path), open_folder(folders("pythia"))
    assert all(torch.equal(source.weights.read(name), expected.weights.read(name)) for name in expected.weights.names())

    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"gpt_neox.embed_in.weight": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="refused"):
        open_folder(tmp_path)


def test_interleaved_rotary_rows_are_reordered_on_export(tmp_path):
    """A model with neighbouring rotary pairs computes the same in Hugging Face's half-split form."""
    model = ModelConfig(
        num_layers=1, hidden_size=16, num_heads=2, vocab_size=8, seq_length=8, ffn_hidden_size=16, rope_interleaved=True
    )
    model.fill_in()
    weights = {
        part.name: torch.randn(part.shape) for rule in make_huggingface_rules(model, "llama") for part in rule.parts
    }
    write_folder(Source(tmp_path, "memory", model, MemoryWeights(weights), len(weights)), tmp_path)
    written = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    ours = weights["layers.0.attention.key.weight"]
    for head in range(2):
        for pair in range(4):
            assert torch.equal(written[head * 8 + pair], ours[head * 8 + 2 * pair])
            assert torch.equal(written[head * 8 + 4 + pair], ours[head * 8 + 2 * pair + 1])
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"],
        weights["layers.0.attention.value.weight"],
    )


def test_slopes_that_transformers_would_ignore_are_not_exported():
    """transformers' MPT reads alibi_bias_max and does not use it."""
    model = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_heads=2,
        vocab_size=8,
        seq_length=8,
        norm="layernorm",
        activation="gelu",
        position="alibi",
        tie_embeddings=True,
    )
    model.fill_in()
    assert choose_architecture(model).model_type == "mpt"
    model.alibi_max_bias = 16.0
    with pytest.raises(ConfigError, match="mpt cannot express model.alibi_max_bias=16.0"):
        choose_architecture(model)


def test_models_no_architecture_can_express():
    model = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=8, seq_length=8, embedding_norm=True)
    model.fill_in()
    with pytest.raises(ConfigError, match="llama cannot express model.embedding_norm=True"):
        choose_architecture(model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bloom"}, "model_type='bloom' is not supported; supported are cohere, cohere2"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope scaling 'proportional' is not supported"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6' is not supported"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
    ],
)
def test_configs_that_are_refused(folders, change, message):
    config = json.loads((folders("llama2") / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        read_config({**config, **change})


def test_every_listed_architecture_is_tested(folders):
    tested = {json.loads((folders(name) / "config.json").read_text())["model_type"] for name in NAMES}
    assert tested == set(FAMILIES)


def test_tokenizer_travels(folders, tmp_path):
    """An exported folder's AutoTokenizer gives the ids of the tokenizer the model was trained with."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"])
    text = "def train(model): return the loss of the model on the text"
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(tmp_path / "my-tokenizer.json"))
    write_folder(open_folder(folders("llama2")), tmp_path / "out", tokenizer=tmp_path / "my-tokenizer.json")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.eos_token == "<|endoftext|>"
    assert loaded.decode(tokenizer.encode(text).ids) == text


def test_control_tokens_of_a_new_config(folders, tmp_path):
    """Llama's class would take 1 and 2 for begin and end where config.json does not say otherwise."""
    source = open_folder(folders("llama2"))
    source.config_json = None
    write_folder(source, tmp_path / "bare")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "bare")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(["<s>", "<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_folder(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 3, None)
