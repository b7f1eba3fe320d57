"""What a run begins with is compared with what it is set to: refused, told, or nothing to say."""

from dataclasses import asdict

import pytest

from megalm.config import Config, ConfigError
from megalm.config.compose import compose_config
from megalm.train.resume import SettingsCheck, list_changed_settings

WHERE = "runs/a/checkpoints/step-00000010"


def configuration(*overrides: str) -> Config:
    return compose_config(["+model=tiny", "train.steps=20", "optim.warmup_steps=2", *overrides])


def state(*overrides: str, total: int = 20) -> dict:
    return {"step": 10, "total_steps": total, "config": asdict(configuration(*overrides))}


def told(stored: dict, config: Config, *, step: int = 10, **options) -> dict | None:
    check = SettingsCheck(config, **options)
    check(stored, WHERE)
    return list_changed_settings(config, check.origin("load_weights" if options else "resume", step))


def test_the_same_settings_are_nothing_to_tell():
    assert told(state(), configuration()) is None


def test_settings_that_an_earlier_version_did_not_have_are_no_difference():
    stored = state()
    del stored["config"]["model"]["rope_theta"], stored["config"]["ops"], stored["config"]["data"]["fim_tokens"]
    assert told(stored, configuration()) is None
    with pytest.raises(ConfigError, match="model.rope_theta: 10000.0 in the checkpoint"):
        told(stored, configuration("model.rope_theta=5e5"))


def test_settings_that_this_version_does_not_have_are_told():
    stored = state()
    stored["config"]["model"]["sinks"], stored["config"]["new"] = 4, {"a": 1}
    event = told(stored, configuration())
    assert event is not None and "does not know: model.sinks, new" in event["text"]


def test_a_checkpoint_that_says_nothing_is_taken():
    assert told({"step": 10}, configuration("train.seed=7")) is None


def test_another_length_alone_changes_the_learning_rate_and_says_so():
    event = told(state("train.steps=10", total=10), configuration())
    assert event is not None and event["lr_before"] == pytest.approx(3e-5) and event["lr_now"] > 1e-4
    assert "train.steps 10 -> 20" in event["text"] and "step 11 has" in event["text"]


def test_another_layout_is_told_without_a_word_on_the_learning_rate():
    event = told(state(), configuration("parallel.tensor=2", "train.micro_batch_size=4"))
    assert event is not None and "parallel.tensor 1 -> 2" in event["text"] and "learning rate" not in event["text"]


def test_a_new_run_may_compute_something_else_with_weights_and_says_so():
    event = told(state(), configuration("model.rope_theta=5e5", "train.seed=7", "optim.lr=1"), weights_only=True)
    assert event is not None and [each["key"] for each in event["changes"]] == ["model.rope_theta"]
    assert "something else with these weights" in event["text"]


def test_an_imported_model_is_compared_too():
    stored = {"step": 0, "model": asdict(configuration("model.norm_eps=1e-6").model)}
    with pytest.raises(ConfigError, match="model.norm_eps: 1e-06 in the checkpoint"):
        told(stored, configuration())
    assert told(stored, configuration("model.norm_eps=1e-6", "train.seed=7")) is None
    event = told(stored, configuration(), weights_only=True)
    assert event is not None and "model.norm_eps" in event["text"]


def test_what_was_allowed_is_told():
    event = told(state(), configuration("train.seed=7", "checkpoint.allow_changes=[train.seed]"))
    assert event is not None and "train.seed 1234 -> 7" in event["text"]
