"""Languages of texts, against the translations that the system's programs bring along."""

import gettext
import json
import random
import re
from pathlib import Path

import pytest

from megalm.config.errors import ConfigError
from megalm.corpus.filter.language import load_detector, simplify_code
from tests.corpus.filter.test_rules import run
from tools.filter.__main__ import main

LANGUAGES = re.findall(
    r"\w+",
    "ar bg bn ca cs da de el es et fa fi fr he hi hu id it ja ko lt lv mk nl no pl pt ro ru sk sl sq sr sv ta th tr uk ur vi zh",
)
CHARACTERS = 300
TEXTS = 12  # of each language
PLACE = re.compile(r"%(\(\w+\))?[-#0-9.*$l]*[a-z]|\{\w*\}|<[^>]+>|https?:\S+|--?\w[\w-]*|\\.|\s+")


def read_translations() -> list[tuple[str, str]]:
    """(language, text of about 300 characters) of the catalogues of this system."""
    found = []
    for language in LANGUAGES:
        code = {"no": "nb", "zh": "zh_CN"}.get(language, language)
        messages = []
        for path in sorted(Path("/usr/share/locale").glob(f"{code}/LC_MESSAGES/*.mo")):
            with open(path, "rb") as file:
                try:
                    catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
                except (OSError, UnicodeDecodeError):
                    continue
            pairs = ((key, text) for key, text in catalogue.items() if isinstance(key, str) and key)
            texts = (PLACE.sub(" ", text) for key, text in pairs if isinstance(text, str) and text != key)
            messages += [text for text in texts if len(text) > 20]
        random.Random(0).shuffle(messages)
        joined, texts = "", []
        for message in messages:
            joined += " " + message
            if len(joined) >= CHARACTERS:
                texts.append(joined.strip())
                joined = ""
            if len(texts) == TEXTS:
                break
        found += [(language, text) for text in texts]
    return found


@pytest.mark.parametrize("library", ["pycld2", "py3langid"])
def test_at_least_95_of_100_translations_are_known(library):
    pytest.importorskip(library)
    labelled = read_translations()
    if len({language for language, _ in labelled}) < 20:
        pytest.skip("this system has translations of fewer than 20 languages")
    detect = load_detector(library)
    right = sum(simplify_code(detect(text)[0][0]) == language for language, text in labelled)
    assert right / len(labelled) >= 0.95, (right, len(labelled))


GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, und niemand weiß genau, warum er das eigentlich tut."
ENGLISH = "The quick brown fox jumps over the lazy dog, and nobody knows exactly why it does so every single morning."


@pytest.mark.parametrize("library", ["pycld2", "py3langid"])
def test_a_rule_keeps_languages_and_names_them(library):
    pytest.importorskip(library)
    rule = {"language": ["de", "nb"], "by": library, "at_least": 0.65}
    batch, why = run([rule], [GERMAN, ENGLISH, "", "\x01\x02" + GERMAN])
    assert why == [None, "language", "language", None]
    assert batch.labels["language"][:2] == ["de", "en"] and batch.columns["language"][0] > 0.9


def test_the_language_stands_in_the_output(tmp_path):
    pytest.importorskip("pycld2")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": GERMAN}) + "\n" + json.dumps({"text": ENGLISH}) + "\n")
    (tmp_path / "r.yaml").write_text("rules:\n- {language: [de]}\n")
    command = [str(tmp_path / "in.jsonl"), "--rules", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "o.jsonl")]
    assert main([*command, "--workers", "1"]) == 0
    assert [json.loads(line)["filter"]["language"] for line in (tmp_path / "o.jsonl").open()] == ["de", "en"]


def test_wrong_languages_are_refused():
    with pytest.raises(ConfigError, match="'german': give codes of ISO 639"):
        run([{"language": ["german"]}], ["a"])
    with pytest.raises(ConfigError, match="by 'guess': choose one of pycld2, py3langid"):
        run([{"language": ["de"], "by": "guess"}], ["a"])
