"""megalm from Python, as a notebook's user would: from texts to a model that writes."""

import subprocess
import sys

import pytest

import megalm
from megalm.config import ConfigError
from tests.small_run import small_run


def test_importing_megalm_imports_nothing_heavy():
    code = "import megalm, sys; print([m for m in ('torch', 'numpy', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_from_texts_to_a_model_that_writes(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text("the cat sat on the mat and the dog lay on the rug. " * 30)
    outcome = megalm.tokenize(texts, tmp_path / "mine", train_bpe=300)
    assert outcome.documents == 20 and outcome.prefix
    words = small_run(
        tmp_path, "model.vocab_size=384", f"data.train={outcome.prefix}", f"data.tokenizer={outcome.tokenizer}"
    )
    words = [word for word in words if word != "data.tokenizer=null"]
    run = megalm.train([*words, "train.sample=false"])
    assert run.status == 0 and len(run.losses) == 6 and run.config.train.steps == 6
    assert megalm.train(words).losses == run.losses  # complete: nothing is trained again
    model = megalm.load(run.folder)
    one, two = model.generate(["the cat", "the dog"], max_tokens=5, temperature=0.0)
    assert one == model.generate("the cat", max_tokens=5, temperature=0.0) and isinstance(two, str)
    assert model.logits("the cat").shape[1] == 384
    detailed = model.generate("the cat", max_tokens=5, temperature=0.0, details=True)
    assert detailed[0].text == one and len(detailed[0].written.log_probabilities) == 5
    with pytest.raises(ConfigError, match="there are max_tokens"):
        model.generate("the", length=3)
    with pytest.raises(ConfigError, match="the model sees between 1 and 32"):
        model.logits(list(range(33)))


def test_a_plan_is_a_value():
    planned = megalm.plan(["+model=7b", "cluster=h100", "world_size=64"])
    assert planned.counts.total > 6e9 and planned.as_dict()


def test_wrong_input_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="a list of words"):
        megalm.train("+model=tiny")
    with pytest.raises(ConfigError, match="Did you mean"):
        megalm.train(["+model=tinny"])
    with pytest.raises(ConfigError, match="one of them"):
        megalm.tokenize(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="float32"):
        megalm.load(tmp_path, dtype="int4")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = megalm.trian
