"""`megalm convert`: every direction, through folders, as a person would."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from megalm.checkpoint.reader import CheckpointReader
from megalm.config.compose import compose_config
from megalm.convert.formats import open_source
from tests.convert.architectures import NAMES, build, transformers
from tests.convert.megatron_checkpoints import make_model, random_weights, write_ranks
from tools.convert.__main__ import main


def bits(folder) -> dict[str, torch.Tensor]:
    return {key: value.view(torch.int32) for key, value in load_file(folder / "model.safetensors").items()}


def same_bits(a, b) -> bool:
    first, second = bits(a), bits(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama3").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_through_a_run_and_back_changes_no_bit(name, tmp_path):
    build(name).save_pretrained(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "run"), "--to", "megalm"]) == 0
    assert main([str(tmp_path / "run"), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    assert same_bits(tmp_path / "hf", tmp_path / "back")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor", "2", "--pipeline", "2"],
        ["--tensor", "2", "--names", "legacy"],
        ["--pipeline", "2", "--names", "legacy-2.6"],
        ["--torch-dist"],
    ],
)
@pytest.mark.parametrize("name", ["llama-linear-scaling", "llama3", "qwen2", "gpt2", "qwen3"])
def test_through_megatron_and_back_changes_no_bit(name, layout, tmp_path, capsys):
    build(name).save_pretrained(tmp_path / "hf")
    status = main([str(tmp_path / "hf"), str(tmp_path / "megatron"), "--to", "megatron", *layout])
    if name in ("llama-linear-scaling", "llama3"):  # Megatron has Llama 3's stretching with 8192 positions only
        assert status == 2
        assert "Megatron-LM cannot express model.rope_scaling" in capsys.readouterr().err
        return
    assert status == 0
    back = ["--to", "huggingface", "--vocab-size", "96"]
    assert main([str(tmp_path / "megatron"), str(tmp_path / "back"), *back]) == 0
    assert same_bits(tmp_path / "hf", tmp_path / "back")


def test_verify_compares_bits_and_logits_with_transformers(llama, tmp_path, capsys):
    assert main([str(llama), str(tmp_path / "run"), "--to", "megalm", "--verify", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.split("\ntrain on")[0])
    assert answer["identical"] and answer["source_tensors"] == answer["used"] == answer["global_tensors"] == 21
    assert answer["source_run_by"] == "transformers" and answer["target_run_by"] == "megalm"
    assert answer["logits_difference"] < 1e-4
    assert (
        main([str(tmp_path / "run"), str(tmp_path / "m"), "--to", "megatron", "--verify"]) == 2
    )  # stretched positions
    assert (
        main([str(tmp_path / "run"), str(tmp_path / "half"), "--to", "huggingface", "--dtype", "bfloat16", "--verify"])
        == 0
    )
    text = capsys.readouterr().out
    assert "weights differ (another dtype)" in text and "rounded to the new dtype" in text
    assert transformers.AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_the_check_names_what_was_left_out(tmp_path, capsys):
    model = make_model(tie_embeddings=True)
    folder = write_ranks(tmp_path / "m", random_weights(model), model, 2, 2)
    assert main([str(folder), str(tmp_path / "hf"), "--to", "huggingface", "--vocab-size", "50", "--verify"]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"29 tensors, 26 used; 2 left out \(follows .*; 1 left out \(is embedding.*none left over", text
    ), text
    assert "the same function" in text


def test_a_model_from_a_run_trains_under_the_printed_arguments(llama, tmp_path, capsys):
    main([str(llama), str(tmp_path / "run"), "--to", "megalm"])
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("train on: megalm train ")
    config = compose_config(command.split(), check=False)
    expected = open_source(llama).model
    assert config.model == expected
    assert open_source(tmp_path / "run").model == expected
    assert config.checkpoint.load == "weights" and CheckpointReader(config.checkpoint.load_path).names()


def test_reshard_keeps_everything_a_run_resumes_from(llama, tmp_path):
    main([str(llama), str(tmp_path / "run"), "--to", "megalm"])
    assert main(["reshard", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    before, after = CheckpointReader(tmp_path / "run"), CheckpointReader(tmp_path / "merged")
    assert before.state() == after.state() and before.names() == after.names()
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names())
    assert main(["reshard", str(tmp_path / "run"), str(tmp_path / "one.safetensors")]) == 0
    single = load_file(tmp_path / "one.safetensors")
    assert single.keys() == set(before.names())
    assert all(torch.equal(before.tensor(name), single[name]) for name in single)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["SRC", "DST", "--to", "huggingface", "--tensor", "2"], "tensor=2 has no meaning for huggingface"),
        (["SRC", "DST", "--to", "megatron", "--torch-dist", "--tensor", "2"], "tensor=2 has no meaning for torch_dist"),
        (["SRC", "DST", "--to", "megalm", "--vocab-size", "5"], "a vocabulary size is only needed for Megatron-LM"),
        (["SRC", "SRC", "--to", "megalm"], "exists and is not an empty folder"),
        (["DST", "SRC2", "--to", "megalm"], "no such folder"),
        (["EMPTY", "DST", "--to", "megalm"], "neither a run of megalm's"),
        (["SRC", "DST", "--to", "huggingface", "--tokenizer", "nowhere.json"], "nowhere.json: no tokenizer here"),
        (["reshard", "SRC", "DST"], "there is no checkpoint"),
    ],
)
def test_mistakes_are_one_clear_message(arguments, message, llama, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    places = {
        "SRC": str(llama),
        "DST": str(tmp_path / "DST"),
        "SRC2": str(tmp_path / "S2"),
        "EMPTY": str(tmp_path / "EMPTY"),
    }
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
