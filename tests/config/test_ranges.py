"""Which numbers each field holds."""

import math
from dataclasses import fields, is_dataclass
from typing import Union, get_args, get_type_hints

import pytest

from megalm.config import Config, ConfigError
from megalm.config.compose import compose_config
from megalm.config.fields import Range
from megalm.config.ranges import check_fields
from megalm.config.typed import Kind, build, find_kind, list_fields


def members(hint) -> set[type]:
    """The plain types that a type hint is made of."""
    return set().union(*map(members, get_args(hint))) if get_args(hint) else {hint}


def groups_below(group: type) -> list[type]:
    found = [group]
    for kind in list_fields(group).values():
        inner = kind.part() if kind.is_list else kind
        if inner.is_group:
            found += groups_below(inner.type)
    return found


NUMERIC = [
    (group, field)
    for group in groups_below(Config)
    for field in fields(group)
    if members(get_type_hints(group)[field.name]) & {int, float}
]


def paths(group: type, prefix: str = "") -> list[tuple[str, Range]]:
    """Dotted paths of the numeric fields that no list holds."""
    found = []
    for field in fields(group):
        kind = list_fields(group)[field.name]
        if is_dataclass(kind.type):
            found += paths(kind.type, f"{prefix}{field.name}.")
        elif "range" in field.metadata:
            found.append((f"{prefix}{field.name}", field.metadata["range"]))
    return found


@pytest.mark.parametrize(
    ("group", "field"), NUMERIC, ids=lambda value: getattr(value, "__name__", getattr(value, "name", ""))
)
def test_every_number_has_a_range(group, field):
    assert isinstance(field.metadata.get("range"), Range)


def refusal(word: str) -> str:
    with pytest.raises(ConfigError) as refused:
        compose_config(["+model=tiny", word])
    return str(refused.value)


@pytest.mark.parametrize(("path", "allowed"), paths(Config), ids=lambda value: value if isinstance(value, str) else "")
def test_no_number_is_nan_or_beyond_its_range(path, allowed):
    kind = find_kind(Config, path.split("."))
    wrong = [] if kind.origin is Union else ["nan"] if allowed.infinite else ["nan", "inf", "-inf"]
    wrong += ["-1"] if (allowed.at_least, allowed.above) != (None, None) else []
    for word in wrong:
        value = {"bf16": word} if kind.is_mapping else [word, word] if kind.is_list else word
        for part in reversed(path.split(".")):
            value = {part: value}
        with pytest.raises(ConfigError, match=path):
            check_fields(build(Kind(Config), value))
            raise AssertionError(word)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.weight_decay=-1", "must be 0 or positive. Leave it out for the default, 0.1"),
        ("optim.eps=0", "must be positive"),
        ("optim.betas=[0.9,1]", "at least 0 and below 1"),
        ("model.rope_fraction=2", "above 0 and at most 1"),
        ("model.rope_fraction=0.001", "rotates nothing"),
        ("model.num_heads=0", "must be at least 1"),
        ("parallel.zero_stage=3", "at least 0 and at most 2"),
        ("parallel.data=0", "must be at least 1"),
        ("resilience.timeout_minutes=1e12", "at most 525600"),
        ("data.weights=[1,-1]", "each number must be 0 or positive"),
        ("data.weights=[0,0]", "above 0"),
        ("data.split=nan,1,1", "up to three shares"),
        ("data.split=inf", "up to three shares"),
        ("data.split=0,1", "up to three shares"),
        ("data.phases=[{name: a, steps: 0}]", "data.phases[0].steps=0"),
        ("data.phases=[{name: a, steps: 3, schedule: linear, lr: nan}]", "data.phases[0].lr=nan"),
        ("guard.rungs=[{action: lower_lr, lr_scale: nan}]", "guard.rungs[0].lr_scale=nan"),
        ("cluster.attention_efficiency={forward: 2}", "at most 1"),
    ],
)
def test_a_number_that_cannot_work_is_refused_with_what_is_allowed(word, said):
    assert said in refusal(word)


def test_a_model_file_is_held_to_the_same_ranges(tmp_path):
    text = "num_layers: 2\nhidden_size: 64\nnum_heads: 4\nvocab_size: 100\nseq_length: 32\nnorm_eps: .nan\n"
    (tmp_path / "m.yaml").write_text(text)

    with pytest.raises(ConfigError, match="model.norm_eps=nan"):
        compose_config([f"+model={tmp_path}/m.yaml"])


def test_damage_on_purpose_may_be_infinite():
    assert compose_config(["+model=tiny", "guard.provoke.factor=inf"]).guard.provoke.factor == math.inf


def test_a_rate_alone_is_enough():
    for lr in (1e-7, 3e-4, 1e-2):
        assert compose_config(["+model=tiny", f"optim.lr={lr}"]).optim.min_lr == pytest.approx(lr / 10, rel=1e-6)
    assert compose_config(["+model=tiny"]).optim.min_lr == 3e-5
    assert compose_config(["+model=tiny", "optim.min_lr_ratio=0"]).optim.min_lr == 0


@pytest.mark.parametrize(("experiment", "lowest"), [("first", 3e-5), ("spike/base", 1e-4), ("spike/bit_flip", 1e-4)])
def test_recipes_end_where_they_did_and_follow_another_rate(experiment, lowest):
    assert compose_config(["+model=tiny", f"+experiment={experiment}"]).optim.min_lr == lowest
    assert compose_config(["+model=tiny", f"+experiment={experiment}", "optim.lr=1e-5"]).optim.min_lr < 1e-5


@pytest.mark.parametrize(
    "words",
    [
        ["train.global_batch_size=10"],
        ["train.global_batch_size=1"],
        ["train.global_batch_size=7"],
        ["optim.reset_every=100"],
        ["optim.reset_every=1"],
        ["data.phases=[{name: a, steps: 3, global_batch_size: 12}]"],
    ],
    ids=" ".join,
)
def test_one_key_alone_breaks_no_other(words):
    config = compose_config(["+model=tiny", *words])
    assert config.train.global_batch_size % config.train.micro_batch_size == 0
