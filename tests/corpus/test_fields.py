import json

import pytest

from megalm.corpus.documents import BadDocument, Document, read_json_line
from megalm.corpus.fields import (
    find_column,
    is_one_text,
    list_names,
    look_up_value,
    replace_text,
    take_text,
    unescape_template,
)


def text(record, field):
    found = read_json_line(json.dumps(record).encode(), 0, field)
    assert isinstance(found, Document), found
    return found.text


def reason(record, field):
    found = read_json_line(json.dumps(record).encode(), 0, field)
    assert isinstance(found, BadDocument), found
    return found.reason


@pytest.mark.parametrize(
    "name",
    [
        "page title",
        "a/b",
        "a.b",
        "größe",
        "日本 語",
        "x:y",
        "a-b",
        "$ref",
        "0",
        "a[0]",
        'say "x"',
        "a\\nb",
        " t",
        "a,b",
        "#",
    ],
)
def test_every_key_can_be_named_alone_and_in_a_template(name):
    record = {name: "T", "text": "body"}
    assert text(record, name) == "T"
    assert text(record, f"{{{name}}}: {{text}}") == "T: body"
    assert unescape_template(f"{{{name}}}\\n{{text}}") == f"{{{name}}}\n{{text}}"
    assert unescape_template(name) == name


@pytest.mark.parametrize("name", ["{x}", "a{b}c", "{a} {b}", "}", "a{", "{{x}}", '"q"', '{"'])
def test_a_key_with_braces_can_be_named_alone_and_in_quotes_in_a_template(name):
    record = {name: "T", "x": "wrong", "a": "wrong", "b": "wrong"}
    assert text(record, name) == "T"
    assert text(record, unescape_template(f"<{{{json.dumps(name)}}}>\\n{{x}}")) == "<T>\nwrong"


def test_doubled_braces_of_a_template_are_braces():
    assert text({"a": "x"}, "{{{a}}} {{}} {{b}}") == "{x} {} {b}"
    assert text({"a": "{a}"}, "{a}{a}") == "{a}{a}"
    assert text({"a": "x"}, unescape_template("{{\\n{a}}}")) == "{\nx}"


@pytest.mark.parametrize(
    "field", ["{pagetitle} {text}", "{text} {", "{} {text}", "{text}}", "{text {page title}}", "{{text}}"]
)
def test_what_no_key_is_called_is_refused_with_the_names_there_are(field):
    said = reason({"page title": "T", "text": "body"}, field)
    assert "is missing" in said and said.split("there are: ")[1].startswith("page title, text")


def test_a_path_leads_through_objects_and_lists():
    record = {
        "messages": [{"content": "a"}, {"content": "b"}],
        "x.y": {"z": "flat"},
        "t": ["p", "q"],
        "x": {"y": {"w": "deep"}},
    }
    assert text(record, "messages.0.content") == "a" and text(record, "messages.-1.content") == "b"
    assert text(record, "messages.*.content") == "a\nb" and text(record, "t.*") == "p\nq" and text(record, "t.1") == "q"
    assert text(record, "x.y.z") == "flat" and text(record, "x.y.w") == "deep"
    assert text(record, "{t.0}/{messages.1.content}") == "p/b"
    assert text({"t.*": "key", "t": ["a"]}, "t.*") == "key"
    for field in ("t.2", "t.-3", "t.x", "messages.0", "messages.*.none", "t.0.z", "t.99999999999999"):
        assert "field" in reason(record, field)


def test_a_list_and_an_object_say_how_to_name_a_text_in_them():
    assert "is a list, not text (name one of it: t.0, or all, joined by line ends: t.*)" in reason({"t": ["a"]}, "t")
    assert reason({"meta": {"en": "a", "de": "b"}}, "meta").endswith("there are: meta.en, meta.de")
    assert reason({"meta": {"en": "a"}, "n": 1}, "meta.fr").endswith("there are: meta.en")
    assert reason({"messages": [{"role": "a", "body": "b"}]}, "messages.0.content").endswith(
        "messages.0.role, messages.0.body"
    )
    assert reason({str(n): n for n in range(20)}, "text").endswith("there are: 0, 1, 2, 3, 4, 5, 6, 7, ...")


def test_half_of_a_surrogate_pair_is_no_text_wherever_it_stands():
    for line in (b'"\\ud800"', b'{"text": "\\ud800"}'):
        assert "surrogate" in read_json_line(line, 0, "text").reason
    assert "surrogate" in take_text({"a": "\ud800", "b": "x"}, "{b}{a}")[1]


def test_columns_are_those_that_names_are_of():
    assert list_names("{a b}-{c.d}") == ["a b", "c.d"] and list_names("{a") == ["{a"]
    assert find_column("a.b.c", ["a", "a.b"]) == "a.b" and find_column("a", ["b"]) is None
    assert look_up_value({"a": {"b": None}}, "a.b") is None and look_up_value({"a": 1}, "b") is None


def test_a_text_is_replaced_where_it_was_found():
    record = {"messages": [{"content": "a"}, {"content": "b"}], "x.y": {"z": "flat"}, "t": ["p", "q"]}
    for field in ("messages.-1.content", "x.y.z", "t.0"):
        changed = replace_text(record, field, "new")
        assert look_up_value(changed, field) == "new" and look_up_value(record, field) != "new"
        assert json.dumps(changed).count("new") == 1 and len(json.dumps(changed)) < len(json.dumps(record)) + 3
    assert is_one_text("t.0") and not is_one_text("t.*") and not is_one_text("{t}")
