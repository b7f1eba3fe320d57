"""IFEval's 25 rules, each followed and not followed, and a suite of them asked of a model."""

import json

import pytest

from megalm.__main__ import main
from megalm.config.errors import ConfigError
from megalm.evaluate.instructions import check_instructions, count_capital_words, count_sentences, follow_instructions
from megalm.evaluate.item import Task
from megalm.evaluate.tasks.rows import make_item
from tests.evaluate.models import make_model

PROMPT = "Say it again."
THREE = "One is here. Two is there! Is three anywhere?"
RULES = {
    "keywords:existence": ({"keywords": ["sea"]}, "the Sea is wide", "the lake is wide"),
    "keywords:frequency": ({"relation": "at least", "keyword": "sea", "frequency": 2}, "sea, sea", "sea"),
    "keywords:forbidden_words": ({"forbidden_words": ["sea"]}, "seaside", "the sea"),
    "keywords:letter_frequency": ({"let_relation": "less than", "letter": "t", "let_frequency": 2}, "at", "that"),
    "language:response_language": (
        {"language": "de"},
        "Das ist ein kurzer deutscher Satz.",
        "This is a short sentence.",
    ),
    "length_constraints:number_sentences": ({"relation": "less than", "num_sentences": 4}, THREE, THREE + " Four."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "length_constraints:number_words": ({"relation": "at least", "num_words": 3}, "one two three", "one two"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "now\n\nThen what",
        "then\n\nnow what",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] of [place]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. one more", "Bye."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n* two", "* one"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 1}, "this is *it*", "this is it"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "a\nb",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1"),
    "detectable_format:title": ({}, "<<On the sea>>\ntext", "On the sea\ntext"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one and two"),
    "combination:repeat_prompt": ({"prompt_to_repeat": PROMPT}, PROMPT + " Again.", "Again."),
    "startend:end_checker": ({"end_phrase": "That is all."}, "Text. That is all.", "That is all. Text."),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2},
        "ONE TWO",
        "ONE two",
    ),
    "change_case:english_capital": ({}, "THIS IS WRITTEN IN ENGLISH WORDS", "This is written in English words"),
    "change_case:english_lowercase": ({}, "this is written in english words", "This is written in English words"),
    "punctuation:no_comma": ({}, "one and two", "one, two"),
    "startend:quotation": ({}, '"all of it"', '"all" of it'),
}


def item(*rules):
    row = {"prompt": PROMPT, "instruction_id_list": [n for n, _ in rules], "kwargs": [s for _, s in rules]}
    return make_item(row, "instruct", "here")


def test_a_rule_of_every_kind_is_tested():
    pytest.importorskip("if_verifiable")
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    assert set(RULES) == set(INSTRUCTION_DICT) and len(RULES) == 25


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_tells_what_follows_it_from_what_does_not(rule):
    pytest.importorskip("if_verifiable")
    settings, right, wrong = RULES[rule]
    asked = item((rule, settings))
    check_instructions(Task("x", "instruct", (asked,)))
    assert follow_instructions(asked, right).values["prompt_strict"] == 1.0
    found = follow_instructions(asked, wrong)
    assert found.values["prompt_strict"] == 0.0 and found.broken == [rule]


def test_loose_forgives_a_first_line_and_counts_rules_apart_from_prompts():
    pytest.importorskip("if_verifiable")
    asked = item(("startend:quotation", {}), ("punctuation:no_comma", {}))
    values = follow_instructions(asked, 'Of course!\n"all of it"').values
    assert values == {"prompt_strict": 0, "prompt_loose": 1, "rules_strict": 1, "rules_loose": 2, "rules": 2}
    assert follow_instructions(asked, "").values["rules_loose"] == 0


def test_sentences_do_not_end_at_abbreviations():
    pytest.importorskip("nltk")
    assert count_sentences("Dr. Smith met Mr. Jones at 3 p.m. on Jan. 5. They spoke, e.g. of ships.") == 2
    assert count_sentences(THREE) == 3 and count_sentences("") == 0
    assert count_capital_words("The NASA-ESA plan, a US one: I AGREE") == 4


def test_a_rule_that_there_is_not_and_a_setting_that_it_does_not_take_are_named():
    pytest.importorskip("if_verifiable")
    broken = item(("keywords:nothing", {}))
    with pytest.raises(ConfigError, match="item 1: there is no rule 'keywords:nothing'; there are keywords:existence"):
        check_instructions(Task("x", "instruct", (broken,)))
    broken = item(("keywords:frequency", {"relation": "around", "keyword": "a", "frequency": 1}))
    with pytest.raises(ConfigError, match="the rule keywords:frequency does not take"):
        check_instructions(Task("x", "instruct", (broken,)))


@pytest.mark.parametrize("settings", [None, [], [1], {}])
def test_a_row_whose_settings_do_not_fit_its_rules_is_named(settings):
    row = {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": settings}
    with pytest.raises(ConfigError, match="here: 'kwargs' is .*a list of objects, one for each rule"):
        make_item(row, "instruct", "here")


def test_a_suite_of_requests_is_asked_as_a_conversation(tmp_path, capsys):
    pytest.importorskip("if_verifiable")
    rows = [
        {"prompt": "Write, but no commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "prompt": "Write in JSON, with [placeholders].",
            "instruction_id_list": ["detectable_format:json_format", "detectable_content:number_placeholders"],
            "kwargs": [{}, {"num_placeholders": 9}],
        },
    ]
    (tmp_path / "ifeval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entry = "{label: ifeval, dataset_uri: ifeval.jsonl, icl_task_type: instruction_following, max_tokens: 8}"
    (tmp_path / "mine.yaml").write_text(f"icl_tasks:\n  - {entry}\n")
    model = make_model(tmp_path / "model")
    words = ["evaluate", str(model), "--suite", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out")]
    assert main([*words, "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert set(task["figures"]) == {"prompt_strict", "prompt_loose", "rules_strict", "rules_loose"}
    assert task["figures"]["rules_strict"]["value"] <= 2 / 3
    second = json.loads((tmp_path / "out" / "ifeval.jsonl").read_text().splitlines()[2])
    assert second["note"].startswith("not followed: detectable_format:json_format")
    assert main([*words]) == 0 and "(from before)" in capsys.readouterr().out
    show = ["evaluate", "show", "ifeval", "1", str(model), "--suite", str(tmp_path / "mine.yaml"), "--json"]
    assert main(show) == 0
    told = json.loads(capsys.readouterr().out)
    assert "user\nWrite, but no commas.<|im_end|>\n<|im_start|>assistant\n" in told["requests"][0]["prompt"]
