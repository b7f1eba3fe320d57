"""`python -m tools.generate` on folders of every kind."""

import io
import json

import pytest

from megalm.config.compose import compose_config, config_yaml
from tests.convert.architectures import build, transformers
from tools.convert.__main__ import main as convert
from tools.generate.__main__ import main

TEXT = "the model writes what it has read and reads what it has written"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with a tokenizer of 96 words."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("model")
    build("llama2").save_pretrained(path)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    letters = sorted({letter.replace(" ", "\u0120") for letter in TEXT})
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=96, special_tokens=["<|endoftext|>"], initial_alphabet=letters)
    tokenizer.train_from_iterator([TEXT, "writing reading models have had"], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def answer(arguments, capsys) -> dict:
    assert main([str(argument) for argument in arguments] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_greedy_text_of_a_folder_is_that_of_transformers(folder, capsys):
    ours = answer(
        [folder, "--prompt", "the model ", "--temperature", "0", "--max-tokens", "12", "--ignore-end"], capsys
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("the model ", return_tensors="pt")
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = peer.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], **settings)[0]
    assert ours["tokens"] == expected[prompt["input_ids"].shape[1] :].tolist()
    assert ours["text"].startswith("the model ")


def test_a_run_and_its_exports_write_the_same(folder, tmp_path, capsys):
    assert convert([str(folder), str(tmp_path / "run"), "--to", "megalm"]) == 0
    assert convert([str(tmp_path / "run"), str(tmp_path / "megatron"), "--to", "megatron", "--tensor", "2"]) == 0
    capsys.readouterr()
    sampling = ["--prompt", "it", "--seed", "3", "--max-tokens", "8"]
    first = answer([folder, *sampling], capsys)
    assert first["tokens"] == answer([tmp_path / "run", *sampling], capsys)["tokens"]
    assert first["tokens"] == answer([tmp_path / "run" / "checkpoints" / "step-00000000", *sampling], capsys)["tokens"]
    arguments = [tmp_path / "megatron", *sampling, "--tokenizer", folder / "tokenizer.json"]
    assert len(answer(arguments, capsys)["tokens"]) <= 8
    assert first["tokens"] != answer([folder, *sampling[:-4], "--seed", "4", "--max-tokens", "8"], capsys)["tokens"]


def test_text_streams_and_the_prompt_may_come_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the model\n"))
    assert main([str(folder), "--max-tokens", "5", "--seed", "1"]) == 0
    streamed = capsys.readouterr().out
    assert streamed.startswith("the model")
    whole = answer([folder, "--prompt", "the model", "--max-tokens", "5", "--seed", "1"], capsys)
    assert streamed == whole["text"] + "\n"
    assert answer([folder, "--prompt", "", "--max-tokens", "3"], capsys)["prompt"] == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["MODEL", "--prompt", "x", "--temperature", "-1"], "--temperature=-1.0 must be at least 0"),
        (["MODEL", "--prompt", "x", "--top-p", "1.5"], "--top-p=1.5 must be between 0 and 1"),
        (["MODEL", "--prompt", "x", "--tokenizer", "nowhere.json"], "nowhere.json"),
        (["BARE", "--prompt", "x"], "no tokenizer beside the model; give its file with --tokenizer"),
    ],
)
def test_mistakes_are_one_message(folder, arguments, message, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    places = {"MODEL": str(folder), "BARE": str(bare)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_run_without_checkpoints_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(config_yaml(compose_config(["+model=tiny"], check=False)))
    assert main([str(tmp_path), "--prompt", "x"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
