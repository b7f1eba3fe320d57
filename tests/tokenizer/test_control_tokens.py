"""Which ids begin, end and pad a text, and what stands before a prompt: against transformers on the same folder."""

import json
import shutil

import pytest

from megalm.config.errors import ConfigError
from megalm.corpus.tokenizer_training import train_byte_level_bpe
from megalm.tokenizer.tokenizer import load_tokenizer
from tests.texts import sentences

NAMES = ["<s>", "</s>", "<pad>"]
NAMED = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>"},
}
CONFIG = {"model_type": "llama", "vocab_size": 400, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tokenizer.json with three control tokens of the numbers 0, 1, 2 that adds none by itself."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("plain") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=NAMES, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([sentences(i, 3) for i in range(200)], trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def folder(plain, tmp_path):
    shutil.copy(plain, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def add_template(folder, template):
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)]),
        ]
    )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("add_begin", [None, True, False])
def test_a_prompt_has_the_ids_that_transformers_gives_it(folder, template, add_begin):
    add_template(folder, template)
    write(folder, "tokenizer_config.json", NAMED if add_begin is None else {**NAMED, "add_bos_token": add_begin})
    ours, other = load_tokenizer(folder), theirs(folder)
    for text in ["a few words that are longer than the truncation", "", "one </s> two"]:
        assert ours.encode_prompt(text).ids == other(text, truncation=False).input_ids, text
    assert 0 not in ours.encode("<s>abc")  # a document is text, whatever a prompt is


def test_a_begin_token_that_the_prompt_spells_is_not_added_again(folder):
    add_template(folder, "<s> $A")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_prompt("<s>abc").ids == tokenizer.encode_prompt("abc").ids
    assert tokenizer.encode_prompt("<s><s>abc").ids.count(0) == 2


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_a_sentencepiece_prompt_begins_as_its_folder_says(settings, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join(sentences(i, 3) for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, remove_extra_whitespaces=False,
    )  # fmt: skip
    write(tmp_path, "config.json", CONFIG)
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **settings})
    ours, other = load_tokenizer(tmp_path), theirs(tmp_path)
    for text in ["some words", "one</s>two </s> three"]:
        assert ours.encode_prompt(text).ids == other(text).input_ids, text
    assert (ours.control.begin, ours.control.end) == (other.bos_token_id, other.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    "files, begin, end, pad",
    [
        ({}, 0, 1, 2),  # by their common spellings
        ({"tokenizer_config.json": NAMED}, 0, 1, None),
        ({"tokenizer_config.json": {**NAMED, "bos_token": None}}, None, 1, None),
        ({"tokenizer_config.json": NAMED, "special_tokens_map.json": {"eos_token": "<pad>"}}, 0, 2, None),
        (
            {
                "tokenizer_config.json": {**NAMED, "added_tokens_decoder": {"0": {"content": "<s>"}}},
                "special_tokens_map.json": {"eos_token": "<pad>"},
            },
            0, 1, None,
        ),
        ({"tokenizer_config.json": {"pad_token": "<pad>"}, "config.json": {**CONFIG, "eos_token_id": 2}}, None, 2, 2),
        (
            {
                "tokenizer_config.json": {"x": 1},
                "config.json": {**CONFIG, "eos_token_id": 2, "bos_token_id": 1},
                "generation_config.json": {"eos_token_id": [0, 2]},
            },
            1, 0, None,
        ),
        ({"tokenizer_config.json": {"x": 1}, "config.json": {**CONFIG, "eos_token_id": 5000}}, None, 1, None),
    ],
)  # fmt: skip
def test_control_tokens_by_name_then_by_number_then_by_spelling(folder, files, begin, end, pad):
    for name, content in files.items():
        write(folder, name, content)
    control = load_tokenizer(folder).control
    assert (control.begin, control.end, control.pad) == (begin, end, pad)


def test_files_that_disagree_are_told(folder):
    write(folder, "tokenizer_config.json", {**NAMED, "pad_token": "<none>"})
    write(folder, "config.json", {**CONFIG, "eos_token_id": [2, 3]})
    first, second = load_tokenizer(folder).control.doubts
    assert "eos_token is '</s>' (1) for the tokenizer, and [2, 3] for the model" in first
    assert "pad_token='<none>', which the tokenizer does not have" in second


def test_a_tokenizer_of_another_name_does_not_listen_to_its_neighbours(folder):
    write(folder, "tokenizer_config.json", {**NAMED, "eos_token": "<pad>"})
    (folder / "tokenizer.json").rename(folder / "mine_tokenizer.json")
    assert load_tokenizer(folder / "mine_tokenizer.json").eos_id == 1


def test_ids_that_no_token_has(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 405, "content": "<far>"})
    write(folder, "tokenizer.json", content)
    assert load_tokenizer(folder).unknown_ids(410) == [400, 401, 402, 403, 404, 406, 407, 408, 409]
    train_byte_level_bpe([sentences(1, 3)], 300, str(tmp_path / "other.json"))
    assert load_tokenizer(tmp_path / "other.json").unknown_ids(300) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "LFS pointer.* 12,345 bytes"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b'{"a": ', "not valid JSON"),
        (b"\0" * 300, "zero bytes"),
    ],
)
def test_a_damaged_file_is_named_for_what_it_is(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: .*{message}"):
        load_tokenizer(folder)


def test_a_byte_order_mark_is_left_out(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("some words")) == "some words"
    assert tokenizer.encode_prompt("some words").ids == tokenizer.encode("some words").tolist()
