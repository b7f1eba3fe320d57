"""Rules as data: what they do to a batch, and what is refused."""

import math

import pytest

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter.batch import STAYS, Batch
from megalm.corpus.filter.rules import describe_presets, list_presets, make_rules, read_rules


def run(rules, texts, fields=None):
    made = make_rules([{"rules": rules}])
    batch = Batch(Texts.of(texts), fields or [{} for _ in texts], made.settings)
    made.apply(batch)
    return batch, [made.names[number] if number != STAYS else None for number in batch.dropped_by.tolist()]


def test_the_first_rule_that_drops_a_document_is_told_with_its_value():
    batch, why = run(
        [{"score": "words", "at_least": 3}, {"name": "long", "score": "characters", "at_most": 20}],
        ["a b", "one two three", "one two three four five six"],
    )
    assert why == ["words", None, "long"]
    assert batch.value.tolist() == [2, 0, 27]
    assert list(batch.columns) == ["words", "characters"]


def test_a_score_behind_an_edit_is_that_of_the_edited_text():
    rules = [
        {"score": "characters"},
        {"edit": "normalize", "form": "NFC"},
        {"score": "characters", "at_most": 1},
    ]
    batch, why = run(rules, ["e\u0301", "ab"])
    assert batch.columns["characters"].tolist() == [2, 2] and batch.columns["characters@1"].tolist() == [1, 2]
    assert why == [None, "characters@1"] and list(batch.texts) == ["é", "ab"]
    assert batch.changed.tolist() == [True, False]


def test_wrongly_decoded_text_is_repaired():
    pytest.importorskip("ftfy")
    batch, _ = run([{"edit": "repair"}], ["schÃ¶n â€œquotedâ€\x9d", "plain “quoted”"])
    assert list(batch.texts) == ["schön “quoted”", "plain “quoted”"]


PERSONAL = (
    "mail jo.doe+x@example.org, call +49 30 1234 5678 or (555) 123-4567, host 8.8.8.8 not 10.0.0.1 or 1.2.3.4.5, "
    + "AKIA"
    + "A" * 16
)


def test_personal_data_is_counted_replaced_and_dropped():
    batch, why = run([{"pii": ["email", "ip", "phone", "key"]}], [PERSONAL, "nobody 12:30 2024-01-02"])
    assert batch.columns["pii"].tolist() == [5, 0] and why == [None, None]
    assert next(iter(batch.texts)) == PERSONAL
    batch, _ = run([{"pii": ["email", "ip", "phone", "key"], "replace": True}], [PERSONAL])
    assert list(batch.texts) == ["mail <email>, call <phone> or <phone>, host <ip> not 10.0.0.1 or 1.2.3.4.5, <key>"]
    _, why = run([{"pii": ["email"], "at_most": 0}], [PERSONAL, "nobody"])
    assert why == ["pii", None]


def test_listed_words_are_counted_whole_or_inside():
    texts = ["Bad word, badly", "很坏的话", "good"]
    batch, why = run([{"words": ["bad"], "at_most": 0}], texts)
    assert batch.columns["listed_words"].tolist() == [1, 0, 0] and why[0] == "listed_words"
    batch, _ = run([{"words": ["坏"], "inside": True, "score_name": "rude"}], texts)
    assert batch.columns["rude"].tolist() == [0, 1, 0]


def test_addresses_go_by_domain_word_and_part():
    urls = [
        "https://sub.Bad.example/x",
        "http://ok.org/casino-tips",
        "http://ok.org/mega-casinos",
        "http://notbad.example",
        None,
    ]
    rule = {"address": "url", "domains": ["bad.example"], "words_in_it": ["casino"], "parts": ["megacas"]}
    _, why = run([rule], ["text"] * 5, [{"url": url} for url in urls])
    assert why == ["listed_address"] * 3 + [None, None]


def test_fields_are_numbers_or_words():
    fields = [{"lang": lang, "meta": {"score": score}} for lang, score in (("en", 3), ("de", 1.5), ("en", True))]
    rules = [{"field": "lang", "one_of": ["en"]}, {"field": "meta.score", "at_least": 2}]
    batch, why = run(rules, ["a"] * 3, fields)
    assert why == [None, "lang", "meta.score"] and batch.columns["meta.score"].tolist() == [3, 1.5, 1]


def test_a_missing_field_is_an_error_or_what_is_said():
    with pytest.raises(ConfigError, match="the field 'score'.*not among text"):
        run([{"field": "score", "at_least": 2}], ["a"], [{"text": "a"}])
    with pytest.raises(ConfigError, match="'high', no number"):
        run([{"field": "score", "at_least": 2}], ["a"], [{"score": "high"}])
    assert run([{"field": "score", "at_most": 2, "missing": "drop"}], ["a"], [{"text": "a"}])[1] == ["score"]
    batch, why = run([{"field": "score", "at_least": 2, "missing": "keep"}], ["a"], [{"text": "a"}])
    assert why == [None] and math.isnan(batch.columns["score"][0])


def count_vowels(text, fields):
    """A user's function."""
    return sum(letter in "aeiou" for letter in text) / fields["per"]


def test_a_function_of_the_users_is_a_score():
    rule = {"function": "tests.corpus.filter.test_rules:count_vowels", "at_least": 2}
    batch, why = run([rule], ["audio", "xyz"], [{"per": 1}, {"per": 1}])
    assert batch.columns["count_vowels"].tolist() == [4, 0] and why == [None, "count_vowels"]
    with pytest.raises(ConfigError, match="count_vowels fails.*KeyError"):
        run([rule], ["audio"], [{}])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "there are no rules"),
        ([{"score": "wrods", "at_least": 1}], "no score 'wrods' .nearest: words."),
        ([{"score": "sentences", "at_least": 1}], "`edit: clean_lines` must come before it"),
        ([{"score": "words", "at_lest": 1}], "unknown key 'at_lest' .nearest: at_least."),
        ([{"score": "words", "at_least": 9, "at_most": 3}], "at_least 9 is more than at_most 3"),
        ([{"score": "words", "at_most": 3}, {"score": "words", "at_least": 9}], "contradict each other: words"),
        ([{"score": "words", "at_least": "many"}], "at_least is 'many': give a number"),
        ([{"score": "words", "field": "x"}], "give one of score, field.*not several"),
        ([{"words": []}], "give a list of words"),
        ([{"edit": "wash"}], "no edit 'wash': choose one of clean_lines"),
        ([{"edit": "normalize", "form": "NFX"}], "form 'NFX'"),
        ([{"edit": "clean_lines", "terminal": 1}], "terminal is 1: it takes bool"),
        ([{"pii": ["face"]}], "kind 'face' is not known"),
        ([{"address": "url"}], "give domains, words_in_it or parts"),
        ([{"field": "x", "missing": "guess"}], "choose keep or drop"),
        ([{"function": "nothing"}], "name it as MODULE:NAME"),
        ([{"function": "no_such_module:f"}], "No module named"),
    ],
)  # fmt: skip
def test_wrong_rules_are_refused_in_words(rules, message):
    with pytest.raises(ConfigError, match=message):
        run(rules, ["text"])


def test_files_of_rules(tmp_path):
    (tmp_path / "words.txt").write_text("# rude\nbad\n\nworse thing\n")
    (tmp_path / "inner.yaml").write_text("rules:\n- {words: {file: words.txt}, at_most: 0}\n")
    (tmp_path / "outer.yaml").write_text("rules:\n- include: inner.yaml\n- {score: words, at_least: 2}\n")
    (content,) = read_rules([str(tmp_path / "outer.yaml")])
    assert content["rules"][0]["words"] == ["bad", "worse thing"] and content["rules"][1]["score"] == "words"
    (tmp_path / "round.yaml").write_text("rules:\n- include: round.yaml\n")
    with pytest.raises(ConfigError, match="include themselves"):
        read_rules([str(tmp_path / "round.yaml")])
    for text, message in (
        ("rules: [", "no yaml"),
        ("- a", "a mapping with a list"),
        ("rules: []\nx: 1", "unknown key 'x'"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_rules([str(tmp_path / "bad.yaml")])
    with pytest.raises(ConfigError, match="no rules 'gofer' .nearest: gopher."):
        read_rules(["gofer"])


def test_every_preset_can_be_made():
    assert {"gopher", "c4", "fineweb", "fineweb-edu-like"} <= set(list_presets()) and all(describe_presets().values())
    for preset in list_presets():
        assert make_rules(read_rules([preset])).columns
