"""Two configurations compared: every setting says what it decides, and a run goes on only with what it may."""

import copy

import pytest

from megalm.config import Config, ConfigError
from megalm.config.changes import check_changes, compare, describe_changes
from megalm.config.compose import compose_config
from megalm.config.effects import Effect, list_effects
from megalm.config.saved import make_config, write_config_yaml

EFFECTS = dict(list_effects(Config()))


def configuration(*overrides: str) -> Config:
    return compose_config(["+model=tiny", *overrides])


def differences(*overrides: str) -> dict[str, Effect]:
    return {change.key: change.effect for change in compare(configuration(), configuration(*overrides))}


@pytest.mark.parametrize("key", EFFECTS)
def test_every_setting_says_what_it_decides(key):
    assert EFFECTS[key] is not None, (
        f"say in megalm/config what another {key} changes in a run: Function[...], Course[...]"
    )


@pytest.mark.parametrize(
    ("override", "effect"),
    [
        ("model.rope_theta=500000", Effect.FUNCTION),
        ("model.rope_fraction=0.5", Effect.FUNCTION),
        ("model.rope_scaling.factor=2", Effect.FUNCTION),
        ("model.norm_eps=1e-2", Effect.FUNCTION),
        ("model.activation=geglu", Effect.FUNCTION),
        ("model.position=alibi", Effect.FUNCTION),
        ("model.parallel_residual=true", Effect.FUNCTION),
        ("model.embedding_scale=2", Effect.FUNCTION),
        ("precision.dtype=bf16", Effect.FUNCTION),
        ("model.ffn_hidden_size=64", Effect.FIXED),
        ("model.seq_length=64", Effect.FIXED),
        ("data.shuffle_window=64", Effect.FIXED),
        ("train.seed=7", Effect.ORDER),
        ("train.global_batch_size=16", Effect.ORDER),
        ("data.packing=documents", Effect.ORDER),
        ("data.fim_rate=0.5", Effect.ORDER),
        ("optim.lr=1e-3", Effect.COURSE),
        ("optim.weight_decay=0.2", Effect.COURSE),
        ("model.dropout=0.1", Effect.COURSE),
        ("train.steps=7", Effect.COURSE),
        ("guard.margin=5", Effect.COURSE),
        ("parallel.tensor=2", Effect.LAYOUT),
        ("ops.backend=reference", Effect.LAYOUT),
        ("model.init_std=0.1", Effect.START),
        ("data.valid=elsewhere", Effect.MEASURED),
    ],
)
def test_a_difference_is_told_with_what_it_decides(override, effect):
    key = override.partition("=")[0]
    assert differences(override)[key] is effect


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other",
        "checkpoint.every=7",
        "train.log_every=3",
        "data.prefetch=0",
        "data.train=[elsewhere]",
        "cluster=h100",
    ],
)
def test_what_nobody_need_know_is_no_difference(override):
    assert differences(override) == {}


def test_a_configuration_read_back_is_the_same():
    config = configuration("optim.betas=[0.8,0.9]", "train.steps=5")
    from megalm.config.yaml_text import read_yaml

    assert compare(config, make_config(read_yaml(write_config_yaml(config), "here"), "here")) == []


def test_a_refusal_names_both_values_and_the_key_that_allows():
    changes = compare(configuration(), configuration("train.seed=7", "model.norm_eps=1e-2", "optim.lr=1e-3"))
    with pytest.raises(ConfigError) as refused:
        check_changes(changes, [], "runs/a/checkpoints/step-00000003")
    text = str(refused.value)
    assert (
        "step-00000003" in text
        and "train.seed: 1234 in the checkpoint, 7 now" in text
        and "model.norm_eps: 1e-05" in text
    )
    assert '"checkpoint.allow_changes=[model.norm_eps,train.seed]"' in text and "optim.lr" not in text


@pytest.mark.parametrize("allowed", [["train.seed", "model.norm_eps"], ["train", "model"]])
def test_changes_that_were_asked_for_are_allowed(allowed):
    check_changes(compare(configuration(), configuration("train.seed=7", "model.norm_eps=1e-2")), allowed, "here")


def test_one_key_allows_no_other():
    with pytest.raises(ConfigError, match=r"allow_changes=\[train.seed\]"):
        check_changes(
            compare(configuration(), configuration("train.seed=7")), ["train.seeds", "train.see", "model"], "here"
        )


def test_no_key_allows_other_tensors():
    changes = compare(configuration(), configuration("model.ffn_hidden_size=64"))
    with pytest.raises(ConfigError) as refused:
        check_changes(changes, ["model"], "here")
    assert "allow_changes" not in str(refused.value)


@pytest.mark.parametrize("words", ["[train.sed]", "[modle]", "['']"])
def test_a_key_that_does_not_exist_cannot_be_allowed(words):
    with pytest.raises(ConfigError, match="checkpoint.allow_changes"):
        configuration(f"checkpoint.allow_changes={words}")


def test_comparing_leaves_both_as_they_are():
    first, second = configuration(), configuration("train.seed=7", "guard=strict")
    kept = copy.deepcopy((first, second))
    compare(first, second)
    assert (first, second) == kept


def test_a_line_names_the_first_dozen():
    numbers = ("window=100", "min_window=20", "gate=5", "strong=2", "fall=0.5", "drift=0.4", "alarm=20", "clip=3")
    words = [f"guard.detector.{number}" for number in numbers]
    changes = compare(configuration("guard=off"), configuration("guard=strict", "optim.lr=1e-3", *words))
    assert len(changes) > 12 and f"and {len(changes) - 12} more" in describe_changes(changes)
    assert "optim.lr 0.0003 -> 0.001" in describe_changes(changes)
