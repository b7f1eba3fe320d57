"""What each protocol asks, against plain references, and what its scores decide."""

import random
import tempfile
from pathlib import Path

import pytest
import torch

from megalm.config.errors import ConfigError
from megalm.evaluate.evaluation import Model
from megalm.evaluate.item import Item, Task
from megalm.evaluate.protocols import PROTOCOLS
from megalm.evaluate.request import Request, Score, cut_left, roll
from megalm.evaluate.tasks.suite import read_suite
from megalm.generate.model import compute_logits
from tests.evaluate.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model.load(make_model(tmp_path_factory.mktemp("model")))


def score_plainly(model, request):
    """One row, no batch, no padding, fp32."""
    logits = compute_logits(model.transformer, torch.tensor([request.ids[:-1]]))[0].log_softmax(-1)
    places = range(len(request.ids) - request.count, len(request.ids))
    values = [float(logits[place - 1, request.ids[place]]) for place in places]
    return sum(values), all(int(logits[place - 1].argmax()) == request.ids[place] for place in places)


def requests_of(model, protocol, shots=1):
    tasks = [task for task in read_suite("smoke").tasks if task.kind != "generate"]
    asked = [Task(**{**vars(task), "num_fewshot": shots}) for task in tasks]
    prompts = [p for task in asked for p in PROTOCOLS[protocol].prompts(task, model.tokenizer, model.length, 6)]
    return [request for prompt in prompts for request in prompt.requests]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_are_those_of_one_row_at_a_time(model, protocol):
    requests = requests_of(model, protocol)
    for request, score in zip(requests, model.scorer.score(requests), strict=True):
        number, likeliest = score_plainly(model, request)
        assert score.log_probability == pytest.approx(number, abs=1e-4)
        assert (score.likeliest, score.tokens) == (likeliest, request.count)


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_batches_of_any_size_give_the_same_scores(model, tokens):
    requests = requests_of(model, "core")
    model.scorer.tokens = tokens
    try:
        found = model.scorer.score(requests)
    finally:
        model.scorer.tokens = 8192
    for one, other in zip(found, model.scorer.score(requests), strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
        assert one.likeliest == other.likeliest


def test_equal_requests_have_equal_scores(model):
    request = Request((1, 20, 30, 40), 2)
    scores = model.scorer.score([request, Request((1, 7), 1), request])
    assert scores[0] == scores[2]


ITEM = Item("choice", ("the of",), ("there it", "all", "all"), (1,))
TASK = Task("t", "choice", tuple(Item("choice", (f"{w} of",), ("x", "y z"), (0,)) for w in "abcdef"), num_fewshot=2)


def decoded(model, protocol, task=TASK, number=0):
    prompt = list(PROTOCOLS[protocol].prompts(task, model.tokenizer, 64))[number]
    pieces = [(r.ids[: len(r.ids) - r.count], r.ids[len(r.ids) - r.count :]) for r in prompt.requests]
    return [tuple(model.tokenizer.decode(ids) for ids in piece) for piece in pieces]


def test_cores_examples_are_drawn_for_each_item_by_its_number(model):
    others = [1, 2, 3, 4, 5]
    drawn = ["abcdef"[i] for i in random.Random(1234).sample(others, 2)]
    shots = "".join(f"{word} of x\n\n" for word in drawn)
    found = decoded(model, "core")
    assert ["".join(piece) for piece in found] == [f"<s>{shots}a of x", f"<s>{shots}a of y z"]
    assert found[0][0] == found[1][0], "what is scored begins where the prompts differ"


def test_the_gauntlet_encodes_context_and_answer_apart(model):
    for context, answer in decoded(model, "gauntlet"):
        assert context.startswith("<s>") and context.endswith("\na of") and answer in (" x", " y z", "x", "y z")


def test_olmes_takes_the_first_examples(model):
    assert decoded(model, "olmes", number=3)[0] == ("<s>a of x\n\nb of x\n\nd of", " x")


def test_one_model_is_scored_differently():
    scores = [Score(-4.0, 2, False), Score(-3.0, 1, False), Score(-3.5, 7, False)]
    item = Item("choice", ("",), ("four", "a", "long choice"), (0,))
    assert PROTOCOLS["lm_eval"].choose(item, scores) == {"acc": 1, "acc_norm": 2, "acc_bytes": 2}
    assert PROTOCOLS["core"].choose(item, scores) == {"acc": 2}
    assert PROTOCOLS["olmes"].choose(item, scores)["acc_per_char"] == 2


def test_equal_scores_choose_the_first():
    score = Score(-4.0, 2, False)
    for protocol in PROTOCOLS.values():
        assert set(protocol.choose(Item("choice", ("",), ("a", "a"), (1,)), [score, score]).values()) == {0}


@pytest.mark.parametrize("tokens,length", [(1, 4), (4, 4), (5, 4), (12, 4), (13, 5)])
def test_rolling_windows_score_every_token_once(tokens, length):
    ids = list(range(100, 100 + tokens))
    windows = roll(ids, 1, length)
    assert [token for window in windows for token in window.ids[len(window.ids) - window.count :]] == ids
    assert all(len(window.ids) == length + 1 for window in windows[1:]) and windows[0].ids[0] == 1


def test_a_context_loses_its_beginning_and_a_continuation_nothing():
    assert cut_left([1, 2, 3, 4], [5, 6], 4, "x") == Request((3, 4, 5, 6), 2)
    with pytest.raises(ConfigError, match="x: the continuation has 5 tokens and the model reads 3"):
        cut_left([1], [2, 3, 4, 5, 6], 4, "x")


def test_too_many_examples_are_refused(model):
    task = Task("few", "choice", TASK.items, num_fewshot=9)
    with pytest.raises(ConfigError, match="few: 9 examples are asked for, and there are 6 rows"):
        list(PROTOCOLS["core"].prompts(task, model.tokenizer, 64))


@pytest.mark.parametrize("family", ["llama2", "gpt2", "gemma2"])
def test_what_begins_alike_is_read_once_and_scores_are_the_same(family):
    from megalm.evaluate.scoring import Scorer
    from megalm.evaluate.sharing import SharingScorer, find_groups
    from megalm.generate.model import load_model
    from tests.convert.architectures import build

    random_ids = random.Random(4)
    requests = []
    for size in (30, 12, 50, 21):
        context = [random_ids.randrange(90) for _ in range(size)]
        same = [random_ids.randrange(90)]
        for extra in (1, 4, 9):
            tail = [*same, *(random_ids.randrange(90) for _ in range(extra))]
            requests.append(Request((*context, *tail), len(tail)))
    requests.append(Request((1, 2, 3), 2))
    assert [len(group.prefix) for group in find_groups(requests)] == [29, 11, 49, 20]
    with tempfile.TemporaryDirectory() as folder:
        build(family).save_pretrained(folder)
        _, transformer = load_model(Path(folder))
    shared = SharingScorer(transformer, tokens=200)
    found, plain = shared.score(requests), Scorer.score(shared, requests)
    for one, other in zip(found, plain, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
        assert (one.likeliest, one.tokens) == (other.likeliest, other.tokens)
