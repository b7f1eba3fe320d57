"""Which files of a folder are the model's weights, held against transformers, and what damaged ones are called."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megalm.config.errors import ConfigError
from megalm.convert.huggingface import open_folder
from tests.convert.architectures import build, transformers
from tools.convert.__main__ import main as convert

FORMS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n"


def save(folder, form: str, seed: int) -> None:
    """The same small model with other weights for each seed, in one of the four forms that transformers reads."""
    state = {name: value.clone() for name, value in build("llama2", seed).state_dict().items()}
    parts = (
        [dict(list(state.items())[::2]), dict(list(state.items())[1::2])] if form.endswith(".index.json") else [state]
    )
    stem, suffix = ("model", "safetensors") if "safetensors" in form else ("pytorch_model", "bin")
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = form if len(parts) == 1 else f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}"
        weight_map |= dict.fromkeys(part, name)
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    if len(parts) > 1:
        (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    build("llama2").config.save_pretrained(path)
    return path


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_the_files_that_transformers_takes_are_taken(folder, first, second):
    for seed, form in enumerate(dict.fromkeys((first, second))):
        save(folder, form, seed)
    source = open_folder(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(source.weights.read("embedding.weight"), theirs["model.embed_tokens.weight"])
    left = [form for form in (first, second) if form != min((first, second), key=FORMS.index)]
    assert len(source.notes) == len(left)
    if left:
        assert "left from another save" in source.notes[0]


def test_an_import_says_what_it_did_not_read(folder, tmp_path, capsys):
    save(folder, "model.safetensors.index.json", 0)
    save(folder, "model.safetensors", 1)
    for name in (
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "model.fp16.safetensors",
        "training_args.bin",
    ):
        shutil.copy(folder / "model.safetensors", folder / name)
    assert convert([str(folder), str(tmp_path / "out"), "--to", "megalm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stale, others = [line for line in lines if line.startswith("note: ")]
    assert stale.startswith("note: model.safetensors is read, as transformers does; model-00001-of-00002.safetensors, ")
    assert others.startswith("note: not read: adapter_model.safetensors, consolidated.safetensors, model.fp16")
    assert "training_args" not in stale + others


@pytest.mark.parametrize(
    "name, message",
    [
        ("consolidated.safetensors", "the authors' own format; take the files that transformers reads"),
        ("consolidated.00.pth", "the authors' own format"),
        ("adapter_model.safetensors", "an adapter .LoRA., not a model; merge it into its base model"),
        ("adapter_model.bin", "an adapter"),
        ("model.fp16.safetensors", "the variant 'fp16' of the weights; .* rename it to model.safetensors"),
        ("pytorch_model.ema.bin", "the variant 'ema' .* rename it to pytorch_model.bin"),
        ("model-00001-of-00003.safetensors", "one of several files; copy the whole folder"),
        ("weights.safetensors", "if it holds the whole model, rename it to model.safetensors"),
        ("model.Q4_K_M.gguf", "a gguf file"),
        ("tf_model.h5", "a h5 file"),
        (None, "no weights here; a Hugging Face folder has model.safetensors"),
    ],
)
def test_a_folder_with_other_weights_alone_is_refused_by_what_they_are(folder, name, message):
    if name:
        (folder / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=message):
        open_folder(folder)


def test_all_shards_without_their_index_are_read_and_told(folder):
    save(folder, "model.safetensors.index.json", 3)
    (folder / "model.safetensors.index.json").unlink()
    source = open_folder(folder)
    assert torch.equal(
        source.weights.read("embedding.weight"), build("llama2", 3).state_dict()["model.embed_tokens.weight"]
    )
    assert "without an index" in source.notes[0]


@pytest.mark.parametrize(
    "content, message",
    [
        (LFS, "is a Git LFS pointer, not the file itself of 269,060,552 bytes; fetch it: .*git lfs pull"),
        (b"", "is empty; copy it again"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page"),
        (b'{"error":"Repository not found"}', "is the server's answer"),
        (b"Entry not found", "is the server's answer 'Entry not found'"),
        (b"\0" * 4096, "zero bytes only"),
        (b"\x1f\x8b\x08" + b"z" * 200, "is a compressed file; unpack it first"),
        (b"not weights at all, but text of some length", "not a safetensors file|not a file that torch.save wrote"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_file_of_weights_is_named_in_one_line(folder, tmp_path, name, content, message, capsys):
    (folder / name).write_bytes(content)
    assert convert([str(folder), str(tmp_path / "out"), "--to", "megalm"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 400 and "weights_only" not in said
    with pytest.raises(ConfigError, match=f"{name}: .*({message})"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
def test_a_file_that_was_cut_short_is_named(folder, name, share):
    save(folder, name, 0)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ConfigError, match=f"{name}: .*(cut short|truncated).*copy it again") as error:
        open_folder(folder)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", [LFS, b"", b"<html>", b"[1, 2]"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_named(folder, name, content):
    save(folder, "model.safetensors.index.json", 0)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: (is a Git LFS|is empty|is a web page|holds list)"):
        open_folder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {"dtype": "F32"},
        {"dtype": "F32", "shape": [2], "data_offsets": ["a", 3]},
        {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]},
    ],
)
def test_a_damaged_header_is_named(folder, entry):
    header = json.dumps({"model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ConfigError, match="model.safetensors: damaged"):
        open_folder(folder)
