import base64
import hashlib
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalm.config.errors import ConfigError
from megalm.corpus.tokenizer_training import train_byte_level_bpe
from megalm.tokenizer import tiktoken_ranks
from megalm.tokenizer.proof import make_proof_texts
from megalm.tokenizer.tiktoken_ranks import ENCODINGS, hash_of, read_ranks
from megalm.tokenizer.tokenizer import FAST_BACKENDS, HuggingFaceTokenizer, load_tokenizer
from tests.texts import documents, sentences


def reference(path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def test_trained_bpe_gives_back_every_text(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (400, 0, None)
    for text in [*documents(20), *make_proof_texts()[:60]]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_the_librarys_own_except_for_control_tokens(tokenizer_file):
    tokenizer, native = load_tokenizer(tokenizer_file), reference(tokenizer_file)
    for text in documents(30, seed=5):
        if "<|endoftext|>" not in text:
            assert tokenizer.encode(text).tolist() == native.encode(text).ids
    poisoned = "a<|endoftext|>b"
    assert 0 in native.encode(poisoned).ids
    assert 0 not in tokenizer.encode(poisoned) and tokenizer.decode(tokenizer.encode(poisoned)) == poisoned


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_fast_backends_give_the_same_ids(tokenizer_file, backend):
    pytest.importorskip(backend)
    fast, slow = load_tokenizer(tokenizer_file, backend=backend), load_tokenizer(tokenizer_file, backend="tokenizers")
    assert (fast.backend, slow.backend) == (backend, "tokenizers")
    texts = documents(50, seed=3)
    for a, b in zip(fast.encode_batch(texts), slow.encode_batch(texts), strict=True):
        assert np.array_equal(a, b)


def test_a_wrong_fast_backend_is_caught_at_the_start(tokenizer_file, monkeypatch):
    right = reference(tokenizer_file)

    def wrong(self, name):
        return lambda text: right.encode(text, add_special_tokens=False).ids[: 3 if "  " in text else None]

    monkeypatch.setattr(HuggingFaceTokenizer, "_fast_encoder", wrong)
    tokenizer = HuggingFaceTokenizer(tokenizer_file)
    assert tokenizer.choose_backend() == "tokenizers" and "differ" in tokenizer.rejected["gigatoken"]
    with pytest.raises(ConfigError, match="gigatoken.*differ"):
        HuggingFaceTokenizer(tokenizer_file, "gigatoken")


def test_a_backend_that_panics_on_the_input_is_replaced(tokenizer_file, monkeypatch):
    slow = load_tokenizer(tokenizer_file, backend="tokenizers")

    class Panic(BaseException):
        pass

    def fragile(self, name):
        def encode(text):
            if "zebra" in text:
                raise Panic
            return slow.encode(text)

        return encode

    monkeypatch.setattr(HuggingFaceTokenizer, "_fast_encoder", fragile)
    tokenizer = HuggingFaceTokenizer(tokenizer_file)
    assert tokenizer.choose_backend() == FAST_BACKENDS[0]
    tokenizer.prove(["one zebra"])
    assert tokenizer.backend == "tokenizers" and tokenizer.encode("zebra").tolist() == slow.encode("zebra").tolist()


def test_end_token_is_found_by_name_or_by_the_configuration(tokenizer_file, tmp_path):
    config = json.loads(Path(tokenizer_file).read_text())
    config["added_tokens"].append({**config["added_tokens"][0], "id": 400, "content": "<|stop|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|stop|>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.token_id("<|stop|>")) == (400, 401, 400)


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(i, 3) for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 1, 2)
    text = sentences(9, 4)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not {1, 2} & set(tokenizer.encode("a </s> b").tolist())
    assert tokenizer.token_id("</s>") == 2 and tokenizer.token_id("nonsense") is None


def write_ranks(path, tokens=()):
    ranks = [*(bytes([i]) for i in range(256)), *tokens]
    path.write_text("\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)))
    return path


def test_tiktoken(tmp_path):
    pytest.importorskip("tiktoken")
    path = write_ranks(tmp_path / "unknown.tiktoken", [b"th", b"the", b" the", b"in"])
    content = path.read_text()
    asked = {"tiktoken_pattern": r"\S+|\s+", "end": "<|end|>=300"}
    tokenizer = load_tokenizer(path, **asked)
    assert tokenizer.encode("the in").tolist() == [257, 32, 259]
    assert tokenizer.decode(tokenizer.encode("x<|end|>é")) == "x<|end|>é" and 300 not in tokenizer.encode("<|end|>")
    assert (tokenizer.eos_id, tokenizer.token_id("<|end|>"), tokenizer.vocab_size) == (300, 300, 301)
    for damaged, match in (
        (content + "\nnot a rank\n", "line 261"),
        (content + "\nYWJj 259\n", "the same number"),
        (content.split("\n", 1)[1], "255 of the 256"),
    ):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match=match):
            load_tokenizer(path, **asked)


@pytest.mark.parametrize("name", ["unknown.tiktoken", "tokenizer.model", "cl100k_base.tiktoken", "gpt2.tiktoken"])
def test_a_rank_file_of_no_public_encoding_is_asked_for_its_splitting_and_its_end(tmp_path, name):
    """Whatever it is called: a name does not make it whole, and no number is made up."""
    pytest.importorskip("tiktoken")
    path = write_ranks(tmp_path / name)
    with pytest.raises(
        ConfigError, match="256 ranks are those of no public encoding.*--tiktoken-pattern.*--eos NAME=NUMB"
    ):
        load_tokenizer(path)
    for pattern in (r"\S+|\s+", "cl100k", "cl100k_base"):
        assert load_tokenizer(path, tiktoken_pattern=pattern).eos_id is None
    tokenizer = load_tokenizer(path, tiktoken_pattern="cl100k", end="<a=b>=256", special=["<fim>=260"])
    assert (tokenizer.eos_id, tokenizer.token_id("<fim>"), tokenizer.vocab_size) == (256, 260, 261)


@pytest.mark.parametrize(
    "asked, match",
    [
        ({"end": "<e>=255"}, "255 is that of another token"),
        ({"end": "<e>=300", "special": ["<f>=300"]}, "300 is that of another"),
        ({"special": ["<f>"]}, "NAME=NUMBER"),
        ({"special": ["<f>=99999999999"]}, "beyond"),
        ({"special": ["<f>=300", "<f>=301"]}, "has the number 300"),
        ({"tiktoken_pattern": "("}, "--tiktoken-pattern"),
        ({"tiktoken_pattern": "gpt3"}, "does not cover all of a text"),
        ({"tiktoken_pattern": r"\w+| "}, "does not cover all of a text"),
    ],
)
def test_numbers_and_patterns_that_a_rank_file_cannot_have_are_refused(tmp_path, asked, match):
    pytest.importorskip("tiktoken")
    path = write_ranks(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=match):
        load_tokenizer(path, **{"tiktoken_pattern": r"\S+|\s+", **asked})


def test_public_encodings_are_those_of_tiktoken_itself(monkeypatch):
    """Hash, splitting and control tokens, read out of the installed package without its files."""
    pytest.importorskip("tiktoken")
    from tiktoken_ext import openai_public

    hashes = []
    monkeypatch.setattr(
        openai_public, "load_tiktoken_bpe", lambda url, expected_hash: hashes.append(expected_hash) or {}
    )
    ours = [encoding for encoding in ENCODINGS if encoding.name != "llama3"]
    assert len(ours) == 4
    for encoding in ours:
        theirs = getattr(openai_public, encoding.name)()
        assert (theirs["pat_str"], theirs["special_tokens"], hashes[-1]) == (
            encoding.pattern,
            encoding.special,
            encoding.hash,
        )


def test_a_public_encoding_is_known_by_its_ranks_whatever_its_name_and_line_ends(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    path = write_ranks(tmp_path / "tokenizer.model", [b"th", b"the"])
    assert hash_of(read_ranks(str(path))) == hashlib.sha256(path.read_bytes() + b"\n").hexdigest()
    known = replace(ENCODINGS[-1], hash=hash_of(read_ranks(str(path))))
    monkeypatch.setattr(tiktoken_ranks, "ENCODINGS", (known,))
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(reversed(path.read_bytes().split(b"\n"))))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (128000, 128001, 128256)
    assert tokenizer.token_id("<|eot_id|>") == 128009 and tokenizer.token_id("<|start_header_id|>") == 128006
    assert tokenizer.token_id("<|reserved_special_token_2|>") == 128004
    assert tokenizer.token_id("<|reserved_special_token_4|>") == 128008
    assert load_tokenizer(path, end="<|eot_id|>").eos_id == 128009
    with pytest.raises(ConfigError, match="has the number 128001"):
        load_tokenizer(path, end="<|end_of_text|>=5000")


def test_sentencepiece_by_a_faster_library_gives_the_same_ids(tmp_path):
    """Its own control tokens, spelt in a text, are text to both; what it cannot do exactly it is not asked for."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("gigatoken")
    (tmp_path / "text.txt").write_text("\n".join(sentences(i, 3) for i in range(300)))
    common = {"input": str(tmp_path / "text.txt"), "minloglevel": 2, "control_symbols": ["[INST]"]}
    common |= {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 320}
    train = sentencepiece.SentencePieceTrainer.train
    train(model_prefix=str(tmp_path / "m"), remove_extra_whitespaces=False, **common)
    train(model_prefix=str(tmp_path / "u"), **common)
    fast, slow = load_tokenizer(tmp_path / "m.model"), load_tokenizer(tmp_path / "m.model", backend="sentencepiece")
    assert (fast.choose_backend(), slow.choose_backend()) == ("gigatoken", "sentencepiece")
    for text in [*documents(20), "a [INST]b</s>", *make_proof_texts(["[INST]"])]:
        assert fast.encode(text).tolist() == slow.encode(text).tolist()
    other = load_tokenizer(tmp_path / "u.model")
    assert other.choose_backend() == "sentencepiece" and "differ" in other.rejected["gigatoken"]
    with pytest.raises(ConfigError, match="--control-tokens"):
        load_tokenizer(tmp_path / "m.model", control_tokens=True)


@pytest.mark.parametrize("control_tokens", [False, True])
@pytest.mark.parametrize("name, end", [("cl100k", 100257), ("o200k", 199999), ("r50k", 50256)])
def test_tiktoken_by_a_faster_library_gives_the_same_ids(tmp_path, name, end, control_tokens):
    pytest.importorskip("tiktoken")
    pytest.importorskip("gigatoken")
    path = write_ranks(tmp_path / "mine.tiktoken", [b"th", b"the", b" the", b"in", b"  ", b"\n\n"])
    asked = {"tiktoken_pattern": name, "end": f"<|endoftext|>={end}", "control_tokens": control_tokens}
    fast, slow = load_tokenizer(path, **asked), load_tokenizer(path, backend="tiktoken", **asked)
    assert (fast.choose_backend(), slow.choose_backend()) == ("gigatoken", "tiktoken")
    for text in [*documents(20), *make_proof_texts(["<|endoftext|>"])]:
        assert fast.encode(text).tolist() == slow.encode(text).tolist()
    assert (end in fast.encode("a<|endoftext|>b")) == control_tokens


def test_control_tokens_are_read_out_of_text_when_asked_for(tokenizer_file):
    native = reference(tokenizer_file)
    for backend in ("auto", "tokenizers"):
        tokenizer = load_tokenizer(tokenizer_file, backend=backend, control_tokens=True)
        for text in ("a<|endoftext|>b", *documents(10)):
            assert tokenizer.encode(text).tolist() == native.encode(text).ids
        assert 0 in tokenizer.encode("a<|endoftext|>b")


@pytest.mark.parametrize("content", [b"{", b'{"model": 3}', b"\xff\xfe\x00", b"hello", b""])
def test_broken_files_are_explained(tmp_path, content):
    pytest.importorskip("sentencepiece")
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ConfigError, match=r"/t: "):
        load_tokenizer(tmp_path / "t")


def test_missing_files_are_explained(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="neither"):
        load_tokenizer(tmp_path)


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="257"):
        train_byte_level_bpe(["a"], 256, tmp_path / "t.json")


@pytest.mark.parametrize("name", FAST_BACKENDS)
def test_the_faster_libraries_come_with_the_package_and_are_pinned(name):
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = next(line for line in project["dependencies"] if line.startswith(name))
    assert "sys_platform == 'linux'" in asked, "a platform without wheels must still install"
    assert re.search(rf"^{name}==", (root / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "is empty"),
        ('{"model": {}}'.encode("utf-16"), "UTF-16"),
        ('{"model": {}}'.encode("utf-16-le"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'{"error": "Repository not found"}', "the server's answer"),
        (b'{"a": 0, "b": 1}', "vocab.json"),
        (b'{"tokenizer_class": "X"}', "tokenizer_config.json"),
        (b'{"model_type": "llama"}', "config.json"),
        (b'{"config": {"version": "v3"}, "vocab": []}', "tekken.json"),
    ],
)
def test_files_that_are_no_tokenizer_say_what_they_are(tmp_path, content, match):
    pytest.importorskip("tiktoken")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        load_tokenizer(tmp_path)


def test_a_byte_order_mark_does_no_harm(tokenizer_file, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + Path(tokenizer_file).read_bytes())
    marked, plain = load_tokenizer(tmp_path), load_tokenizer(tokenizer_file)
    assert marked.decode(marked.encode("some words")) == "some words" and marked.eos_id == plain.eos_id


def tekken(path, version="v3", special=None):
    """Ranks of all bytes and two more, of which one is beyond the vocabulary's size; ten control tokens."""
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the"]
    vocab = [{"rank": n, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for n, t in enumerate(tokens)]
    config = {
        "pattern": r"\w+|\W+",
        "default_vocab_size": 267 + 20,
        "default_num_special_tokens": 30,
        "version": version,
    }
    content = {"config": config, "vocab": vocab} | ({} if special is None else {"special_tokens": special})
    path.write_text(json.dumps(content))
    return path


def test_tekken_json_is_read_with_its_control_tokens_before_the_ranks(tmp_path):
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(tekken(tmp_path / "tekken.json"))
    assert tokenizer.encode("the").tolist() == [30 + 256, 30 + ord("e")]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 287)
    assert min(tokenizer.encode("a</s>[INST]")) >= 30 and tokenizer.decode([2, *tokenizer.encode("the")]) == "</s>the"
    assert (tokenizer.token_id("[INST]"), tokenizer.token_id("<SPECIAL_25>")) == (3, 25)
    assert load_tokenizer(tmp_path / "tekken.json", control_tokens=True).encode("a</s>").tolist() == [30 + ord("a"), 2]
    listed = [{"rank": 0, "token_str": "<unk>"}, {"rank": 5, "token_str": "</s>"}]
    assert load_tokenizer(tekken(tmp_path / "b.json", "v13", listed)).eos_id == 5
    with pytest.raises(ConfigError, match="must list its special_tokens"):
        load_tokenizer(tekken(tmp_path / "c.json", "v13"))
