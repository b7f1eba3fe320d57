"""What belongs to a model beside its weights goes where the model goes."""

import json
import re
import shutil

import pytest

from megalm.config.errors import ConfigError
from megalm.config.saved import load_config
from megalm.convert.formats import open_source
from tests.convert.architectures import transformers
from tests.convert.chat_model import FORMS, check_same_chat_model, make_chat_model
from tools.convert.__main__ import main as convert


@pytest.fixture(scope="module", params=FORMS)
def imported(request, tmp_path_factory):
    """A chat model's folder, the run that it was imported as, and where its template lies."""
    folder = tmp_path_factory.mktemp(request.param)
    make_chat_model(folder / "chat", request.param)
    (folder / "chat" / "LICENSE").write_text("as you like")
    (folder / "chat" / "README.md").write_text("# The model as it was\n")
    assert convert([str(folder / "chat"), str(folder / "runs" / "chat"), "--to", "megalm"]) == 0
    return folder / "chat", folder / "runs" / "chat", request.param


def export(run, target, *options):
    assert convert([str(run), str(target), "--to", "huggingface", *options]) == 0
    return target


def continue_from(imported, folder, **tokenizer):
    """A run that began with the imported one's weights, as far as its configuration goes."""
    _, run, _ = imported
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    config = (run / "config.yaml").read_text()
    for key, value in {"load_path": run, **tokenizer}.items():
        config = re.sub(rf"^  {key}: .*$", f"  {key}: {value}", config, flags=re.M)
    (folder / "config.yaml").write_text(config)
    return folder


def test_an_imported_model_leaves_with_all_its_files(imported, tmp_path):
    original, run, form = imported
    exported = export(run, tmp_path / "out")
    check_same_chat_model(original, exported, form)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "LICENSE",
    ):
        assert (original / name).read_bytes() == (exported / name).read_bytes(), name
    assert (exported / "README.md").read_text() == "# The model as it was\n"


def test_the_run_names_the_folder_of_its_tokenizer_and_not_a_lone_file(imported):
    _, run, _ = imported
    assert load_config(run / "config.yaml").data.tokenizer == str(run / "huggingface")


def test_a_run_that_began_with_an_imported_one_is_the_same_chat_model(imported, tmp_path):
    """Also where its configuration names a copy of the same tokenizer under another name."""
    original, _, form = imported
    shutil.copy(original / "tokenizer.json", tmp_path / "copy.json")
    run = continue_from(imported, tmp_path / "run", tokenizer=tmp_path / "copy.json")
    check_same_chat_model(original, export(run, tmp_path / "out"), form)


def test_a_folder_as_tokenizer_brings_its_files(imported, tmp_path):
    original, _, form = imported
    run = continue_from(imported, tmp_path / "run", load_path="null", tokenizer=original)
    check_same_chat_model(original, export(run, tmp_path / "out"), form)


def test_another_tokenizer_brings_its_own_control_tokens(imported, tmp_path):
    original, _, _ = imported
    content = json.loads((original / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("<|im_end|>", "<|endoftext|>")
    content["model"]["vocab"]["<|endoftext|>"] = content["model"]["vocab"].pop("<|im_end|>")
    (tmp_path / "mine_tokenizer.json").write_text(json.dumps(content))
    run = continue_from(imported, tmp_path / "run", tokenizer=tmp_path / "mine_tokenizer.json")
    exported = export(run, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    config = json.loads((exported / "config.json").read_text())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == (
        "<s>", "<|endoftext|>", None, None
    )  # fmt: skip
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 4, None)
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    assert not (exported / "generation_config.json").exists()


def test_a_tokenizer_that_is_not_there_any_more_is_told(imported, tmp_path, capsys):
    run = continue_from(imported, tmp_path / "run", load_path="null", tokenizer="/nowhere/tokenizer.json")
    exported = export(run, tmp_path / "out")
    assert "note: the run's tokenizer /nowhere/tokenizer.json is not there any more" in capsys.readouterr().out
    assert not list(exported.glob("tokenizer*"))


def test_a_moved_import_still_finds_its_files(imported, tmp_path):
    original, run, form = imported
    config = re.sub(
        r"^  tokenizer: .*$", "  tokenizer: was/here/huggingface", (run / "config.yaml").read_text(), flags=re.M
    )
    shutil.copytree(run, tmp_path / "moved")
    (tmp_path / "moved" / "config.yaml").write_text(config)
    check_same_chat_model(original, export(tmp_path / "moved", tmp_path / "out"), form)


def test_a_file_that_is_a_pointer_is_refused_at_the_import(imported, tmp_path):
    original, _, _ = imported
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copytree(original, tmp_path / name)
        (tmp_path / name / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
        with pytest.raises(ConfigError, match=f"{name}: is a Git LFS pointer"):
            open_source(tmp_path / name)
