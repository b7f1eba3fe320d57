"""Faults in instruction data and pairs: each one planted is told with its line, and clean data is left in peace."""

import json

import pytest

import tools.posttrain
from megalm.config.errors import ConfigError
from megalm.posttrain.lint import lint_files, parse_pair
from megalm.posttrain.render import Renderer
from megalm.tokenizer.chat import ChatTemplate
from megalm.tokenizer.tokenizer import load_tokenizer
from tests.convert.chat_model import TEMPLATE, make_chat_model
from tools.subcommands import run_tool


def talk(question, answer, *more):
    turns = [("user", question), ("assistant", answer), *more]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(folder, records):
    file = folder / "data.jsonl"
    file.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
    return str(file)


def lint(folder, records, renderer=None):
    """Each finding's name and the lines that it names."""
    found = lint_files([write(folder, records)], renderer).findings
    return {finding.check: [int(place.split()[-1]) for place in finding.places] for finding in found}


CLEAN = talk("what is two and two?", "four")


@pytest.mark.parametrize(
    ("fault", "record"),
    [
        ("repeated record", talk("what is two  and two?", "four\n")),
        ("prompt with another answer", talk("what is two and two?", "five")),
        ("empty turn", talk(" ", "yes")),
        ("roles out of order", talk("a", "b", ("assistant", "c"))),
        ("roles out of order", {"messages": [{"role": "assistant", "content": "hello"}]}),
        ("roles out of order", talk("a", "b", ("system", "c"), ("user", "d"), ("assistant", "e"))),
        ("last word not the assistant's", talk("a", "b", ("user", "thanks"))),
        ("unclosed code", talk("a", "look:\n```python\nx = 1\n")),
        ("refusals", talk("a", "I’m sorry, but I cannot help with that.")),
        ("refusals", {"prompt": "a", "completion": "As an AI language model, I have no opinion."}),
        ("refusals", talk("a", "I'm unable to say.")),
        ("broken record", '{"messages": ['),
        ("broken record", {"messages": [{"role": "robot", "content": "x"}]}),
        ("chosen is rejected", {"prompt": "a", "chosen": "same  words", "rejected": "same words"}),
        ("empty answer", {"prompt": "a", "chosen": "b", "rejected": " "}),
        ("broken record", {"prompt": "a", "chosen": "b"}),
        ("broken record", {"chosen": "b", "rejected": "c"}),
    ],
)
def test_a_planted_fault_is_told_with_its_line(tmp_path, fault, record):
    assert lint(tmp_path, [CLEAN, record]) == {fault: [2]}


def test_clean_conversations_have_no_findings(tmp_path):
    tools_used = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "the sum and the product of 2 and 3?"},
            {"role": "assistant", "content": "add(2, 3) multiply(2, 3)"},
            {"role": "tool", "content": "5"},
            {"role": "tool", "content": "6"},
            {"role": "assistant", "content": "5 and 6\n```\n2 + 3\n```"},
        ]
    }
    said = talk("how does one decline?", "One says: I'm sorry, but I cannot.")
    assert lint(tmp_path, [CLEAN, tools_used, said, {"text": "a"}, {"text": "b"}]) == {}


@pytest.mark.parametrize(("longer", "told"), [(30, False), (48, True), (12, True)])
def test_a_length_that_decides_is_told(tmp_path, longer, told):
    pairs = [{"prompt": str(n), "chosen": "long words" if n < longer else "a", "rejected": "short"} for n in range(60)]
    assert ("length decides" in lint(tmp_path, pairs)) is told


def test_the_prompt_of_two_conversations_is_what_they_share():
    better, worse = talk("q", "good")["messages"], talk("q", "bad")["messages"]
    pair = parse_pair({"chosen": better, "rejected": worse}, "x")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "good", "bad")


def test_words_that_a_template_drops_are_told(tmp_path):
    make_chat_model(tmp_path / "model", "files")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    dropping = TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    assert dropping != TEMPLATE
    records = [CLEAN, talk("what is two and three?", "two, three</think>five")]
    assert lint(tmp_path, records, Renderer(ChatTemplate(dropping), tokenizer)) == {"words lost by the template": [2]}
    assert lint(tmp_path, records, Renderer(ChatTemplate(TEMPLATE), tokenizer)) == {}


def test_what_people_would_be_paid_for_it_is_the_planners_price(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file = write(tmp_path, [CLEAN, talk("a", "b", ("user", "c"), ("assistant", "d")), pair, pair, {"text": "t"}, "{"])
    linted = lint_files([file])
    assert linted.kinds == {"instruction_pair": 1, "multi_turn_chat": 1, "comparison": 2}
    assert linted.dollars == 30 + 130 + 2 * 8


def test_the_tool_prints_findings_and_refuses_what_cannot_be_read(tmp_path, capsys):
    file = write(tmp_path, [CLEAN, CLEAN, *({"prompt": "a", "completion": str(n)} for n in range(9))])
    assert run_tool(tools.posttrain, ["lint", file]) == 0
    said = capsys.readouterr().out
    assert "made by people: $330 (11 x instruction pair" in said
    assert "11 records" in said and "repeated record" in said and f"{file} line 2" in said and "and 3 more" in said
    assert run_tool(tools.posttrain, ["lint", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["count"] == 1
    assert run_tool(tools.posttrain, ["lint", str(tmp_path / "none.jsonl")]) == 2
    assert "is not there" in capsys.readouterr().err
    assert run_tool(tools.posttrain, ["lint", file, "--template", "x"]) == 2
    with pytest.raises(ConfigError, match="no record"):
        lint_files([write(tmp_path, [])])
