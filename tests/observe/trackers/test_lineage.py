"""What a tracker is told of a run's settings and origin: all of it, and no secret."""

import subprocess

from megalm.config.compose import compose_config
from megalm.observe.trackers import lineage
from megalm.observe.trackers.lineage import describe_settings, hide_secrets


def test_settings_are_told_without_secrets():
    config = compose_config(
        [
            "+model=tiny",
            "checkpoint.path=s3://me:hunter2@bucket/run?X-Amz-Signature=abcdef&part=1",
            "run.plugin_options={api_key: verysecret, url: 'https://u:p@host/x', every: 3, hub_token: t0ken}",
        ]
    )
    settings = describe_settings(config)
    assert settings["model.hidden_size"] == 256 and settings["train.tokens"] == config.train.tokens
    assert settings["checkpoint.path"] == "s3://***@bucket/run?X-Amz-Signature=***&part=1"
    assert settings["run.plugin_options.api_key"] == settings["run.plugin_options.hub_token"] == "***"
    assert settings["run.plugin_options.url"] == "https://***@host/x" and settings["run.plugin_options.every"] in (
        3,
        "3",
    )
    said = str(settings)
    assert not any(secret in said for secret in ("hunter2", "abcdef", "verysecret", "t0ken", "u:p"))
    assert hide_secrets(["a", {"password": "x", "n": 1}]) == ["a", {"password": "***", "n": 1}]


def test_no_setting_of_ours_is_taken_for_a_secret():
    assert "***" not in map(str, describe_settings(compose_config(["+model=tiny"])).values())


def test_the_commit_of_a_checkout_is_told(tmp_path, monkeypatch):
    assert lineage.find_commit() is None or len(lineage.find_commit().rstrip("+")) == 40
    place = tmp_path / "a" / "b" / "c" / "lineage.py"
    monkeypatch.setattr(lineage, "__file__", str(place))
    assert lineage.find_commit() is None
    for words in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert len(lineage.find_commit()) == 40
