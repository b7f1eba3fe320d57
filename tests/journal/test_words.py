"""Events have words, whatever their numbers are and whoever wrote them."""

import json
import math

import pytest

from megalm.journal import describe_event, describe_event_details, encode_json, format_number, read_number

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (4.56789, "4.5679"),
        (7, "7.0000"),
        (NAN, "NaN"),
        (INF, "inf"),
        (-INF, "-inf"),
        ("nan", "NaN"),
        ("inf", "inf"),
        ("-Infinity", "-inf"),
        ("2.5", "2.5000"),
        (10**400, "inf"),
        (None, "-"),
        ("much", "much"),
        ([1], "[1]"),
    ],
)
def test_a_number_has_words_whatever_it_is(value, said):
    assert format_number(value, ".4f") == said


def test_numbers_come_out_of_a_file_as_they_went_in():
    row = {"a": 1.5, "b": NAN, "c": [INF, -INF, {"d": NAN}], "e": None, "f": True, "g": "nan"}
    text = encode_json(row)
    back = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert back == {"a": 1.5, "b": "nan", "c": ["inf", "-inf", {"d": "nan"}], "e": None, "f": True, "g": "nan"}
    assert math.isnan(read_number(back["b"])) and read_number(back["c"][1]) == -INF
    assert read_number("text") is None and read_number(True) is None and read_number({}) is None


def test_what_json_does_not_know_is_written_as_text(tmp_path):
    import numpy as np
    import torch

    row = {"path": tmp_path, "scalar": np.float32("nan"), "count": np.int64(3), "tensor": torch.tensor(2.5), 4: {1}}
    back = json.loads(encode_json(row))
    assert back == {"path": str(tmp_path), "scalar": "nan", "count": 3, "tensor": 2.5, "4": [1]}
    assert json.loads(encode_json({"several": torch.zeros(2)}))["several"].startswith("tensor")


def spike(**fields):
    return {
        "time": 1.0,
        "step": 30,
        "kind": "spike",
        "onset": 30,
        "cause": "nonfinite",
        "samples": [232, 240],
        **fields,
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss": 5.0, "expected": 4.5}, "onset 30, cause nonfinite, loss 5.0000 where 4.5000 was expected"),
        ({"loss": 5.0, "expected": NAN, "grad_norm": INF}, "onset 30, cause nonfinite, loss 5.0000, gradient norm inf"),
        ({"loss": "nan", "expected": "nan", "grad_norm": 1.0}, "onset 30, cause nonfinite, loss NaN"),
        ({"loss": INF, "expected": 4.5}, "onset 30, cause nonfinite, loss inf where 4.5000 was expected"),
        ({"loss": "-inf", "expected": None}, "onset 30, cause nonfinite, loss -inf"),
        ({"expected": 4.5}, "onset 30, cause nonfinite"),
    ],
)
def test_a_spike_says_what_was_seen_as_far_as_it_is_a_number(fields, words):
    assert describe_event_details(spike(**fields)) == words
    assert describe_event(spike(**fields)) == f"spike at step 30, {words}"


FIELDS = ("loss", "expected", "grad_norm", "z", "seconds", "stall_s", "bytes", "lr_scale", "samples", "why", "to_step",
          "onset", "cause", "what", "text", "reason", "device", "world_size", "step", "kind")  # fmt: skip
VALUES = (
    NAN,
    INF,
    -INF,
    "nan",
    "inf",
    "",
    "some text",
    None,
    0,
    -1,
    10**400,
    True,
    [],
    [1],
    [1, "x"],
    [1, NAN],
    {},
    {"a": 1},
)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_no_field_of_an_event_can_take_its_words_away(field, value):
    for event in (spike(loss=5.0, expected=4.5) | {field: value}, {field: value}, {"kind": "checkpoint", field: value}):
        assert isinstance(describe_event(event), str) and isinstance(describe_event_details(event), str)
        assert describe_event(json.loads(encode_json(event)))
