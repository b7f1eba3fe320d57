"""Votes that are made up, whose truth is known; and the page on which a person votes, in a real browser."""

import json
import math
import random
import shutil

import numpy as np
import pytest

from megalm.__main__ import main
from megalm.config.errors import ConfigError
from megalm.evaluate.pairs import make_pairs, read_pairs, read_votes, tally, write_pairs
from megalm.evaluate.strengths import Vote, fit_strengths
from tests.evaluate.models import make_model

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
PROMPTS = [f"question {n}" for n in range(40)]
FIRST = {prompt: f"an answer of five words {prompt}" for prompt in PROMPTS}
SECOND = {prompt: f"another answer </script> to {prompt}" for prompt in PROMPTS}


def simulate(count, gap, length_effect=0.0, seed=0):
    """Votes of a world where `a` is stronger than `b` by `gap`, and longer answers are liked."""
    rng = random.Random(seed)
    votes = []
    for _ in range(count):
        texts = [" ".join(["word"] * rng.randrange(10, 200)) for _ in range(2)]
        left, right = ("a", "b") if rng.random() < 0.5 else ("b", "a")
        sizes = [len(text.split()) for text in texts]
        odds = (gap if left == "a" else -gap) + length_effect * (sizes[0] - sizes[1]) / sum(sizes)
        votes.append(Vote(left, right, float(rng.random() < 1 / (1 + math.exp(-odds))), *texts))
    return votes


def test_a_planted_strength_and_length_bias_are_recovered():
    found = fit_strengths(simulate(6000, 0.8, 2.0), style=True, bootstrap=0)
    assert found.values[0] - found.values[1] == pytest.approx(0.8, abs=0.15)
    assert found.style["length"] == pytest.approx(2.0, abs=0.3)
    assert found.style["bold"] == pytest.approx(0.0, abs=1e-6)


def test_several_models_stand_in_their_order():
    rng = random.Random(2)
    truth = {"a": 1.0, "b": 0.0, "c": -1.0}
    votes = []
    for _ in range(4000):
        left, right = rng.sample(sorted(truth), 2)
        chance = 1 / (1 + math.exp(truth[right] - truth[left]))
        votes.append(Vote(left, right, float(rng.random() < chance)))
    found = fit_strengths(votes, bootstrap=0)
    assert found.models == ["a", "b", "c"] and found.values == pytest.approx([1.0, 0.0, -1.0], abs=0.15)


def test_bootstrap_intervals_cover_the_truth():
    hits = 0
    for seed in range(200):
        found = fit_strengths(simulate(150, 0.6, seed=seed), bootstrap=200, seed=seed)
        hits += found.low[0] <= 0.3 <= found.high[0]  # strengths are centred: half of the gap
    assert 0.90 < hits / 200 < 0.99


def test_a_model_that_never_lost_has_a_finite_strength():
    found = fit_strengths([Vote("a", "b", 1.0)] * 20, bootstrap=10)
    assert np.isfinite(found.values).all() and found.values[0] > 2


def test_pairs_are_blinded_shuffled_and_checked():
    pairs = make_pairs(PROMPTS, FIRST, SECOND, ("model-a", "model-b"), seed=1)
    plain = [p for p in pairs if p.repeats is None and "shuffled" not in (p.left, p.right)]
    assert len(plain) == 40 and 8 < sum(p.left == "model-a" for p in plain) < 32
    repeated = [p for p in pairs if p.repeats]
    by_id = {p.id: p for p in pairs}
    assert len(repeated) == 4 and all(p.left_text == by_id[p.repeats].right_text for p in repeated)
    assert sum("shuffled" in (p.left, p.right) for p in pairs) == 2
    assert pairs == make_pairs(PROMPTS, FIRST, SECOND, ("model-a", "model-b"), seed=1)


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path, make_pairs(PROMPTS, FIRST, SECOND, ("model-a", "model-b")))
    return tmp_path


def test_the_page_does_not_say_who_wrote_what(folder):
    page = (folder / "vote.html").read_text()
    assert "model-a" not in page and "shuffled" not in page
    assert page.count("</script>") == 1, "no answer ends the script"


def vote_for(pairs, judge):
    return {pair.id: judge(pair) for pair in pairs.values()}


def prefers_a(pair):
    if "shuffled" in (pair.left, pair.right):
        return "right" if pair.left == "shuffled" else "left"
    return "left" if pair.left == "model-a" else "right"


def save(path, votes):
    path.write_text(json.dumps({"name": "x", "votes": votes}))
    return path


def test_votes_are_counted(folder, capsys):
    pairs = read_pairs(folder)
    told = tally(pairs, [vote_for(pairs, prefers_a)] * 2, bootstrap=20).as_dict()
    assert told["wins"] == (80.0, 0.0) and told["share"] == 1.0 and told["interval"][0] > 0.95
    assert (told["self_agreement"], told["attentive"], told["kappa"]) == (1.0, 1.0, 1.0)
    file = save(folder / "votes.json", vote_for(pairs, prefers_a))
    assert main(["evaluate", "votes", str(folder), str(file)]) == 0
    assert "40 won, 0 lost, 0 ties" in capsys.readouterr().out


def test_whoever_always_says_left_agrees_with_nobody(folder):
    pairs = read_pairs(folder)
    told = tally(pairs, [vote_for(pairs, lambda pair: "left")], bootstrap=5).as_dict()
    assert told["self_agreement"] == 0.0 and told["attentive"] < 1.0 and 0.2 < told["share"] < 0.8


@pytest.mark.parametrize("votes,message", [({"zz": "left"}, "no such pair"), ("x", "is no file of votes")])
def test_votes_that_are_none(folder, votes, message):
    with pytest.raises(ConfigError, match=message):
        read_votes(save(folder / "votes.json", votes), read_pairs(folder))


def test_two_models_answer_a_file_of_prompts(tmp_path, capsys):
    models = [str(make_model(tmp_path / name)) for name in ("a", "b")]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what is it?"}\n{"turns": ["who?", "and why?"]}\n')
    words = ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "pairs"), "--max-tokens", "8"]
    assert main(["evaluate", "pairs", *models, *words]) == 0
    told = json.loads(capsys.readouterr().out)
    pairs = read_pairs(tmp_path / "pairs")
    assert told["pairs"] >= 3 and len(pairs) == told["pairs"]
    turns = next(p for p in pairs.values() if p.prompt == "who?\n\nand why?" and "shuffled" not in (p.left, p.right))
    assert "\n\n> and why?\n\n" in turns.left_text and "> and why?" in turns.right_text


def test_a_person_votes_by_keyboard(folder):
    playwright = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no chromium is installed here")
    pairs = read_pairs(folder)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(accept_downloads=True)
        problems = []
        page.on("console", lambda told: problems.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((folder / "vote.html").as_uri())
        page.keyboard.press("1")
        page.keyboard.press("2")
        page.keyboard.press("Backspace")
        page.keyboard.press("3")
        page.click("[data-vote=right]")
        assert f"3 of {len(pairs)}" in page.inner_text("#count")
        page.reload()
        assert f"3 of {len(pairs)}" in page.inner_text("#count"), "a closed page loses nothing"
        for _ in range(len(pairs) - 3):
            page.keyboard.press("1")
        assert "done" in page.inner_text("#count")
        page.fill("#name", "Ada 1")
        with page.expect_download() as download:
            page.click("#save")
        assert download.value.suggested_filename == "votes-Ada-1.json"
        download.value.save_as(folder / "votes.json")
        browser.close()
    votes = read_votes(folder / "votes.json", pairs)
    assert list(votes.values())[:3] == ["left", "tie", "right"] and len(votes) == len(pairs)
    assert problems == []
