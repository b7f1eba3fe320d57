"""Every key is described, and docs/reference.md says the same."""

from pathlib import Path

import pytest

from megalm.config import Config, ConfigError
from megalm.config.reference import describe, list_keys, write_reference_page
from megalm.config.typed import list_paths

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


def test_every_key_has_a_sentence_and_an_effect():
    keys = {key.name: key for key in list_keys()}
    assert set(list_paths(Config)) <= set(keys)
    assert [name for name, key in keys.items() if not key.text.endswith((".", ")", ":"))] == []
    assert [name for name, key in keys.items() if key.effect is None] == []


def test_the_page_is_the_one_that_the_dataclasses_make():
    assert PAGE.read_text(encoding="utf-8") == write_reference_page(), (
        "run: megalm inspect keys --markdown > docs/reference.md"
    )


def test_a_key_a_group_and_an_item_are_described():
    assert "Peak learning rate" in describe("optim.lr") and "positive" in describe("optim.lr")
    assert "optim.betas" in describe("optim") and describe("optim").startswith("optim=")
    assert "guard.rungs[n]." in describe("guard")
    with pytest.raises(ConfigError, match="Did you mean 'optim.lr'"):
        describe("learning_rate")
