"""What of a text does not come back from its tokens is counted and told."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from megalm.config.errors import ConfigError
from megalm.corpus import losses as losses_module
from megalm.corpus.losses import Losses, RoundTrips, Watch, describe_losses, try_round_trips
from megalm.corpus.tokenize_corpus import Settings
from megalm.corpus.tokenize_job import Job, run_job
from megalm.data.tokens import TokenFile
from megalm.tokenizer.tokenizer import load_tokenizer
from tests.texts import documents
from tools.tokenize.__main__ import main


def dropping(path, normalizer=None, **options):
    """A BPE of the letters of a few words, without an unknown token."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False, **options)
    tokenizer.train_from_iterator(["plain ascii words"], trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.save(str(path))
    return str(path)


def words(path, unknown="[UNK]"):
    vocabulary = {"a": 0, "</s>": 1, "[UNK]": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    return str(path)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run(tmp_path, tokenizer, texts, **settings):
    source = write(tmp_path / "a.jsonl", texts)
    return run_job(Job((source,), str(tmp_path / "o"), Settings(tokenizer, **settings)))


def test_characters_that_vanish_are_counted(tmp_path):
    texts = ["plain words", "\u65e5\u672c\u8a9e words", "w\u00f3rds", "no"]
    outcome = run(tmp_path, dropping(tmp_path / "t.json"), texts)
    assert outcome.losses == Losses(dropped=4, dropped_documents=2)
    again = run_job(Job((str(tmp_path / "a.jsonl"),), str(tmp_path / "o"), Settings(str(tmp_path / "t.json"))))
    assert again.reused and (again.losses, again.round_trips) == (outcome.losses, outcome.round_trips)
    assert sum(tally.dropped for tally in outcome.tallies.values()) == 4
    assert json.loads((tmp_path / "o_recipe.json").read_text())["outcome"]["losses"]["dropped"] == 4


@pytest.mark.parametrize(
    "text, normalizer, dropped",
    [
        ("ASCII Words", normalizers.Lowercase(), 0),
        ("ASCII", None, 5),
        ("w\u00f3rd\u0301s", normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), 0),
        ("\uff57ords", normalizers.NFKC(), 0),
        ("was", normalizers.Replace("w", "\u65e5"), 1),
        ("plain </s>", None, 3),  # "<", "/", ">"
        ("", None, 0),
    ],
)
def test_what_vanishes_is_what_the_normalizer_leaves(tmp_path, text, normalizer, dropped):
    assert load_tokenizer(dropping(tmp_path / "t.json", normalizer)).count_dropped(text) == dropped


def test_letters_that_are_known_inside_words_only_vanish_at_their_end(tmp_path):
    tokenizer = load_tokenizer(dropping(tmp_path / "t.json", end_of_word_suffix="</w>"))
    assert tokenizer.count_dropped("plain words") == 0 and tokenizer.count_dropped("pl") == 1


def test_unknown_tokens_are_counted_exactly(tmp_path):
    texts = ["a b", "a x y b", "x", "a </s> b"]
    outcome = run(tmp_path, words(tmp_path / "t.json"), texts)
    assert outcome.losses == Losses(unknown=4, unknown_documents=3)
    assert (TokenFile(tmp_path / "o").tokens == 2).sum() == 4 and outcome.round_trips.changed == 3


def test_sentencepiece_without_byte_fallback_counts_its_unknown_tokens(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join(documents(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=140, minloglevel=2
    )
    outcome = run(tmp_path, str(tmp_path / "m.model"), ["the \u0416 and \u65e5 of", "the end"])
    assert (outcome.losses.unknown, outcome.losses.unknown_documents) == (2, 1)


def test_an_ordinary_token_that_ends_documents_is_told_where_texts_hold_it(tokenizer_file, tmp_path):
    outcome = run(tmp_path, tokenizer_file, ["one\ntwo\n", "three"], eos="\u010a")
    assert outcome.losses == Losses(control=2, control_documents=1)
    assert run(tmp_path, tokenizer_file, ["one\ntwo<|endoftext|>", "three"]).losses == Losses()


def test_a_byte_level_vocabulary_loses_nothing_and_nothing_is_said(tokenizer_file, tmp_path, capsys):
    write(tmp_path / "a.jsonl", [*documents(20), "\u65e5\u672c <|endoftext|> \U0001f469"])
    command = [str(tmp_path / "a.jsonl"), "--tokenizer", tokenizer_file, "--output", str(tmp_path / "o"), "--report"]
    assert main([*command, "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "warning" not in shown.err and "letter by letter" not in shown.err and "dropped" not in shown.out
    assert not load_tokenizer(tokenizer_file).drops_characters


def test_the_tool_says_what_was_lost(tmp_path, capsys):
    write(tmp_path / "a.jsonl", ["plain words", "\u65e5\u672c\u8a9e words"])
    command = [str(tmp_path / "a.jsonl"), "--tokenizer", dropping(tmp_path / "t.json"), "--output", str(tmp_path / "o")]
    assert main([*command, "--report", "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "3 characters of 1 of 2 documents vanished" in shown.err and "comes back as" in shown.err
    assert [line.split()[-1] for line in shown.out.splitlines()[-2:]] == ["3", "3"]


def test_a_text_without_ids_is_named_or_left_out(tmp_path):
    tokenizer = words(tmp_path / "t.json", unknown="<none>")
    with pytest.raises(ConfigError, match=r"a\.jsonl: byte 16: .*no ids for the text 'a x'.*--skip-bad"):
        run(tmp_path, tokenizer, ["a b", "a x", "b"])
    outcome = run(tmp_path, tokenizer, ["a b", "a x", "b"], skip_bad=True)
    assert (outcome.documents, outcome.bad) == (2, 1) and "byte 16" in outcome.listed[0]
    assert TokenFile(tmp_path / "o").num_documents == 2


class Numbers:
    """A tokenizer of which only the numbers matter."""

    vocab_size, drops_characters = 1000, False

    def __init__(self, unknown, control):
        self.unknown_id, self._control = unknown, control

    def control_ids(self):
        return self._control


@pytest.mark.parametrize("unknown", [None, 0, 7, 999])
@pytest.mark.parametrize("control", [[], [5], [5, 6, 900], [1, 200, 400, 600, 800], list(range(0, 1000, 3))])
@pytest.mark.parametrize("begin, end", [(0, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("ranges", [0, losses_module.RANGES])
def test_ids_are_counted_as_one_by_one(monkeypatch, unknown, control, begin, end, ranges):
    monkeypatch.setattr(losses_module, "RANGES", ranges)
    rng = np.random.default_rng(3)
    lengths = rng.integers(begin + end, 30, 50)
    stream = rng.integers(0, 1000, lengths.sum()).astype(np.uint32)
    watch = Watch(Numbers(unknown, control), control_wanted=False, has_begin=bool(begin), has_end=bool(end))
    counts = watch.count([""] * 50, stream, lengths)
    at = 0
    for number, length in enumerate(lengths.tolist()):
        ids = stream[at : at + length].tolist()
        ids = ids[begin : length - end]
        assert counts.unknown[number] == (ids.count(unknown) if unknown is not None else 0)
        assert counts.control[number] == sum(i in control and i != unknown for i in ids)
        at += length


def test_a_prefix_space_is_no_change_and_another_case_is(tokenizer_file, tmp_path):
    config = json.loads(Path(tokenizer_file).read_text())
    config["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "a.json").write_text(json.dumps(config))
    assert try_round_trips(load_tokenizer(tmp_path / "a.json"), ["Some words", " more"]) == RoundTrips(2, 0)
    config["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "b.json").write_text(json.dumps(config))
    trips = try_round_trips(load_tokenizer(tmp_path / "b.json"), ["Some words", "more"])
    assert (trips.tried, trips.changed) == (2, 1) and trips.example[0] == "Some words"
    assert describe_losses(Losses(), trips, 2)[0].startswith("1 of 2 sampled texts do not come back")
    assert describe_losses(Losses(), RoundTrips(2), 2) == []


def test_a_fast_library_that_is_there_and_does_not_serve_is_told(tokenizer_file, tmp_path, monkeypatch, capsys):
    import importlib

    real = importlib.import_module

    def broken(name, *rest):
        if name == "gigatoken":
            raise ImportError("libgomp.so.1: cannot open")
        if name == "fastokens":
            raise ModuleNotFoundError("No module named 'fastokens'", name="fastokens")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    write(tmp_path / "a.jsonl", ["some words"])
    command = [str(tmp_path / "a.jsonl"), "--tokenizer", tokenizer_file, "--output", str(tmp_path / "o")]
    assert main([*command, "--workers", "1"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "encoding by" in line]
    assert said == [
        "encoding by tokenizers: not by gigatoken, because its import fails (libgomp.so.1: cannot open); not by fastokens, "
        "because it is not installed"
    ]
