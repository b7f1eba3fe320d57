"""`megalm generate` on folders of every kind."""

import io
import json
import re
import shutil

import pytest

from megalm.config.compose import compose_config
from megalm.config.saved import write_config_yaml
from tests.convert.architectures import build, transformers
from tools.convert.__main__ import main as convert
from tools.generate.__main__ import main

tokenizers = pytest.importorskip("tokenizers")

TEXT = "the model writes what it has read and reads what it has written"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama of 96 words with a tokenizer of somewhat fewer."""
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
    padding = list(range(len(tokenizer), 96))  # which no tokenizer could read back
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=padding)
    expected = peer.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], **settings)[0]
    assert ours["tokens"] == expected[prompt["input_ids"].shape[1] :].tolist()
    assert ours["text"].startswith("the model ")


def add_begin_token(folder, where) -> None:
    """The folder once more, with a tokenizer that begins every text with a token of its own, and no word unused."""
    shutil.copytree(folder, where)
    path = where / "tokenizer.json"
    content = json.loads(path.read_text())
    there = len(content["model"]["vocab"])
    names = ["<s>", *(f"<{number}>" for number in range(there + 1, 96))]
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": there + number, "content": name} for number, name in enumerate(names)
    ]
    path.write_text(json.dumps(content))
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(path))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (where / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("prompt", ["the model ", "it", "", "the <80>model"])
def test_a_prompt_begins_as_the_tokenizer_of_the_folder_begins_texts(folder, prompt, tmp_path, capsys):
    add_begin_token(folder, tmp_path / "begin")
    ours = answer([tmp_path / "begin", "--prompt", prompt, "--temperature", "0", "--max-tokens", "12"], capsys)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "begin")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "begin")
    given = tokenizer(prompt, return_tensors="pt")
    written = peer.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, given.input_ids.shape[1] :]
    assert ours["tokens"] == [token for token in written.tolist() if token != 2]  # 2: config.json's end of text
    assert ours["text"].startswith(prompt)
    plain = answer([folder, "--prompt", prompt, "--temperature", "0", "--max-tokens", "12"], capsys)
    assert plain["tokens"] != ours["tokens"]


def test_tokens_that_the_tokenizer_does_not_have_are_not_written(folder, tmp_path, capsys):
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    assert size < 96
    hot = ["--temperature", "50", "--top-p", "1", "--max-tokens", "60", "--ignore-end"]
    for place in (folder, tmp_path / "run"):
        if place != folder:
            assert convert([str(folder), str(place), "--to", "megalm"]) == 0
            capsys.readouterr()
        assert max(answer([place, "--prompt", "it", *hot], capsys)["tokens"]) < size


def test_a_run_finds_the_tokenizer_that_its_configuration_names(folder, tmp_path, capsys, monkeypatch):
    assert convert([str(folder), str(tmp_path / "runs" / "one"), "--to", "megalm"]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "runs" / "one" / "huggingface")
    shutil.copy(folder / "tokenizer.json", tmp_path / "words.of.mine")
    config = tmp_path / "runs" / "one" / "config.yaml"
    named = re.sub(r"tokenizer: .*", "tokenizer: words.of.mine", config.read_text())
    config.write_text(named)
    monkeypatch.chdir(tmp_path / "runs")  # not where the run was started
    written = answer(["one", "--prompt", "it", "--seed", "3", "--max-tokens", "8"], capsys)
    assert written["tokens"] == answer([folder, "--prompt", "it", "--seed", "3", "--max-tokens", "8"], capsys)["tokens"]
    (tmp_path / "words.of.mine").unlink()
    assert main(["one", "--prompt", "it"]) == 2
    assert (
        "the run's tokenizer words.of.mine is not there any more; give it with --tokenizer" in capsys.readouterr().err
    )


def test_weights_that_are_no_numbers_are_one_message(folder, tmp_path, capsys):
    broken = build("llama2")
    broken.model.norm.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    capsys.readouterr()
    assert main([str(tmp_path), "--prompt", "it"]) == 2
    assert "largest logit is nan" in capsys.readouterr().err


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
        (["MODEL", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["MODEL", "--prompt", "x", "--temperature", "nan"], "temperature=nan must be at least 0"),
        (["MODEL", "--prompt", "x", "--temperature", "inf"], "temperature=inf must be at least 0 .* and finite"),
        (["MODEL", "--prompt", "x", "--top-p", "1.5"], "top-p=1.5 must be above 0 and at most 1"),
        (["MODEL", "--prompt", "x", "--top-p", "0"], "top-p=0.0 must be above 0 and at most 1"),
        (["MODEL", "--prompt", "x", "--top-p", "nan"], "top-p=nan must be above 0 and at most 1"),
        (["MODEL", "--prompt", "x", "--top-k", "-1"], "top-k=-1 must be at least 1, or 0 for all"),
        (["MODEL", "--prompt", "x", "--max-tokens", "0"], "--max-tokens=0 must be at least 1"),
        (["MODEL", "--prompt", "x", "--max-tokens", "-5"], "--max-tokens=-5 must be at least 1"),
        (
            ["MODEL", "--prompt", "x", "--seed", "99999999999999999999"],
            "--seed=99999999999999999999 must fit into 64 bits",
        ),
        (
            ["MODEL", "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape")],
            "the prompt is not UTF-8 text .at character 4",
        ),
        (["MODEL", "--prompt", "x", "--accept", "rope"], "--accept rope: config.json has no such setting"),
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
    assert re.search(message, captured.err) and captured.err.count("\n") == 1 and not captured.out


def test_a_run_without_checkpoints_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(write_config_yaml(compose_config(["+model=tiny"], check=False)))
    assert main([str(tmp_path), "--prompt", "x"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


def test_many_prompts_and_samples_are_written_together(folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the model "}\n\n{"prompt": "reads"}\n')
    words = [str(folder), "--prompts", str(file), "--samples", "3", "--max-tokens", "6", "--ignore-end", "--rows", "4"]
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        (prompt, seed) for prompt in ("the model ", "reads") for seed in range(3)
    ]
    for line in lines:
        alone = [folder, "--prompt", line["prompt"], "--seed", line["seed"], "--max-tokens", "6", "--ignore-end"]
        assert answer(alone, capsys)["tokens"] == line["tokens"]


def test_a_stop_string_ends_the_text(folder, capsys):
    words = [
        folder,
        "--prompt",
        "the model ",
        "--seed",
        "3",
        "--max-tokens",
        "30",
        "--ignore-end",
        "--temperature",
        "2",
    ]
    whole = answer(words, capsys)["text"].removeprefix("the model ")
    stop = whole[4:6]
    ended = answer([*words, "--stop", stop, "--stop", "never there"], capsys)
    assert ended["text"] == "the model " + whole[: whole.index(stop)]
    assert ended["reason"] == "stop"


@pytest.mark.parametrize(
    ("content", "expected"),
    [("[1]\n", "line 1"), ('{"prompt": 3}\n', '"prompt"'), ("\n", "no prompts"), ("{", "not JSON")],
)
def test_prompts_that_cannot_be_read_are_named(folder, tmp_path, capsys, content, expected):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert main([str(folder), "--prompts", str(file)]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--stop", ""], ["--samples", "0"], ["--rows", "-1"]])
def test_options_that_nothing_can_be_written_with_are_refused(folder, words, capsys):
    assert main([str(folder), "--prompt", "x", *words]) == 2
    assert "error: " in capsys.readouterr().err
