"""Mixtures: the published tables come out, and nonsense is refused."""

import json

import pytest

from megalm.config.compose import compose_config
from megalm.plan.mixture import TokenSupply, compare, measure_distance, read, solve
from tests.plan.published import rows
from tools.mix.__main__ import main

PUBLISHED = rows("mixtures")


def example(name: str):
    found, sources, total = read(name)
    return solve(found, sources, total)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["mixture"] + " " + row["source"])
def test_published_tables_come_out(row):
    source = next(s for s in example(row["mixture"]).sources if s.name == row["source"])
    assert 100 * source.proportion == pytest.approx(float(row["proportion_percent"]))
    assert round(source.epochs, 2) == pytest.approx(float(row["epochs"]), abs=0.011), row["published"]
    if row["tokens_billion"]:
        assert source.tokens / 1e9 == pytest.approx(float(row["tokens_billion"]))
        assert source.available / 1e9 == pytest.approx(float(row["available_billion"]))


def test_the_same_mixture_from_proportions_targets_or_epochs():
    by_share = solve("a", [TokenSupply("x", 10e9, proportion=0.4), TokenSupply("y", 5e9, proportion=0.6)], 20e9)
    by_tokens = solve("b", [TokenSupply("x", 10e9, tokens=8e9), TokenSupply("y", 5e9, tokens=12e9)])
    by_epochs = solve("c", [TokenSupply("x", 10e9, epochs=0.8), TokenSupply("y", 5e9, epochs=2.4)])
    for mixture in (by_share, by_tokens, by_epochs):
        assert mixture.total == pytest.approx(20e9)
        assert [s.proportion for s in mixture.sources] == pytest.approx([0.4, 0.6])
        assert [s.epochs for s in mixture.sources] == pytest.approx([0.8, 2.4])


def test_epochs_above_four_warn():
    assert [warning.split(":")[0] for warning in example("mpt-30b").warnings] == ["RedPajama Wikipedia"]
    assert not example("llama").warnings


def test_comparing():
    first = solve("a", [TokenSupply("x", 1e9, proportion=0.5), TokenSupply("y", 1e9, proportion=0.5)], 1e9)
    second = solve("b", [TokenSupply("x", 1e9, proportion=0.25), TokenSupply("z", 1e9, proportion=0.75)], 1e9)
    assert compare([first, second])[0] == ("z", [None, 0.75])
    assert measure_distance(first, second) == pytest.approx(0.75)


def test_yaml_is_read_back_by_the_launcher(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.yaml"
    words = ["data/web=2.4B@70%", "data/code=1B@30%", "total=1B", "--write", str(file)]
    assert main(words) == 0
    import yaml

    written = yaml.safe_load(file.read_text())
    config = compose_config(
        ["+model=tiny", f"data.train={json.dumps(written['train'])}", f"data.weights={written['weights']}"]
    )
    assert config.data.train == ["data/web", "data/code"] and config.data.weights == [0.7, 0.3]
    assert set(written) == {"train", "weights"}


def test_json_has_units(capsys):
    assert main(["mpt-30b", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] == 1e12 and answer["sources"][0]["proportion_percent"] == pytest.approx(33.5)


@pytest.mark.parametrize(
    "words,message",
    [
        (["a=1B@60%", "b=1B@30%", "total=1B"], "sum to 0.9, not 1"),
        (["a=1B@60%", "b=1B@40%", "total=1T"], "600.0 times"),
        (["a=-1B@60%", "b=1B@40%", "total=1B"], "must be at least 0"),
        (["a=1B@60%", "b=1B@40%", "total=-1"], "above 0"),
        (["a=1B", "total=1B"], "NAME=AVAILABLE@WHAT"),
        (["a=1B@60%", "b=1B@5B"], "add the total"),
        (["nowhere.yaml"], "cannot be read"),
        (["mpt-30b", "total=100T"], "epochs"),
        (["a=1B@100%", "a=1B@100%", "total=1B"], "same name"),
        (["a=1B@NaN"], "must be at least 0"),
    ],
)
def test_bad_mixtures_exit_2_with_one_message(words, message, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and "Traceback" not in captured.err
