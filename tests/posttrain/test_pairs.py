"""Records of preferences: what is a pair, what is refused, how both answers come to lie in one sample, and the reference."""

import json
import re

import numpy as np
import pytest

import tools.posttrain
from megalm.config.compose import compose_config
from megalm.config.errors import ConfigError
from megalm.data.loader import Loader
from megalm.data.openers import open_sources
from megalm.data.pairs import PairedSource
from megalm.data.tokens import TokenFile
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import Mesh
from megalm.posttrain.pairs import parse_pair_record
from megalm.posttrain.prepare import check_tokenizer, prepare
from megalm.posttrain.reference import ReferenceHook
from megalm.tokenizer.tokenizer import load_tokenizer
from megalm.train.parts import build_trainer
from tests.convert.chat_model import make_chat_model
from tests.posttrain.pairs import make_records, pair_run, write_pairs
from tools.subcommands import run_tool


def say(role, content):
    return {"role": role, "content": content}


ASK, GOOD, BAD = say("user", "which?"), say("assistant", "this one"), say("assistant", "that one")


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "which?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "margin": None},
        {"prompt": [ASK], "chosen": GOOD, "rejected": BAD},
        {"chosen": [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "this one"}],
         "rejected": [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "that one"}]},
    ],
)  # fmt: skip
def test_every_form_of_a_pair_is_a_prompt_with_two_answers(value):
    pair = parse_pair_record(value, "x")
    for record, answer in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        assert [dict(message) for message in record.messages] == [ASK, answer] and record.weights == (0.0, 1.0)
    assert pair.margin == 0.0


def test_texts_are_pairs_too():
    pair = parse_pair_record({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3", "margin": 1.5}, "x")
    assert (pair.chosen.completion, pair.rejected.completion, pair.margin) == (" 2", " 3", 1.5)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"prompt": "p", "chosen": "a"}, "has no rejected answer"),
        ({"chosen": "a", "rejected": "b"}, "two answers as texts need a prompt"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "chosen and rejected are the same"),
        ({"chosen": [ASK, GOOD], "rejected": [say("user", "what?"), BAD]}, ".*they answer no common prompt"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "chosen: the completion is empty"),
        (
            {"prompt": [ASK], "chosen": [GOOD], "rejected": [say("robot", "x")]},
            "rejected: .*its role must be one of system, user",
        ),
        (
            {"prompt": [ASK], "chosen": [GOOD], "rejected": [say("user", "x")]},
            "rejected: .*nothing in it is to be learned",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is 'much'"),
    ],
)
def test_what_is_no_pair_is_said(value, said):
    with pytest.raises(ConfigError, match=f"^x: {said}"):
        parse_pair_record(value, "x")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def test_both_answers_of_a_pair_lie_in_one_sample(data, tmp_path):
    config = compose_config(pair_run(tmp_path, data, "data.holdout=0.1"))
    (source,) = open_sources(config.data, 128)
    assert isinstance(source, PairedSource)
    held = source.held_out()
    seen = []
    for part in (source, held):
        for index in range(part.num_samples):
            documents = part.documents_of(index)
            assert (documents[::2] % 2 == 0).all() and (documents[1::2] == documents[::2] + 1).all()
            seen += documents.tolist()
    assert sorted(seen) == list(range(128)), "every answer once, trained on or held out"
    assert held.num_samples > 0


def test_a_pair_longer_than_a_sample_is_refused(data, tmp_path):
    config = compose_config(pair_run(tmp_path, data, "model.seq_length=64"))
    with pytest.raises(ConfigError, match="have 79 tokens together, and a sample holds 64"):
        open_sources(config.data, 64)


def test_margins_come_with_their_pairs(tmp_path):
    make_chat_model(tmp_path / "model", "files")
    records = [{**record, "margin": number} for number, record in enumerate(make_records(20))]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    made = prepare([str(file)], str(tmp_path / "model"), str(tmp_path / "made"))
    assert made.pairs and made.records == 20
    config = compose_config(pair_run(tmp_path, tmp_path / "made", "data.holdout=0"))
    resolve(config, 1)
    loader = Loader(config, Mesh.single().data)
    margins = [
        float(m)
        for b in loader.next()
        for m, there in zip(b.margins.flatten(), b.counted.flatten(), strict=True)
        if there
    ]
    loader.close()
    assert set(margins) <= set(range(20)) and len(set(margins)) > 8


def test_a_file_of_other_records_is_told_from_pairs(tmp_path, data):
    model = str(data.parent / "model")
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    prepare([str(file)], model, str(tmp_path / "x"))
    config = compose_config(pair_run(tmp_path, tmp_path / "x"))
    with pytest.raises(ConfigError, match=r"x.pairs is not there: data.packing=pairs reads what"):
        open_sources(config.data, 128)
    file.write_text(
        json.dumps({"prompt": "p", "chosen": "c", "rejected": "d"}) + "\n" + json.dumps({"text": "t"}) + "\n"
    )
    with pytest.raises(ConfigError, match="line 2: has no chosen answer"):
        prepare([str(file)], model, str(tmp_path / "y"))


def test_answers_that_are_cut_to_the_same_are_refused(tmp_path, data):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "the same to here", "rejected": "the same to there"}) + "\n")
    with pytest.raises(ConfigError, match="chosen and rejected are the same tokens, so far as they are read"):
        prepare([str(file)], str(data.parent / "model"), str(tmp_path / "x"), max_length=6)


def test_lint_finds_pairs_that_cannot_be_trained_on(tmp_path, capsys):
    file = tmp_path / "x.jsonl"
    lines = [
        *make_records(3),
        {"chosen": [ASK, GOOD], "rejected": [ASK, say("robot", "x")]},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_tool(tools.posttrain, ["lint", str(file), "--json"]) in (0, 1)
    found = {one["check"]: one["count"] for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["broken record"] == 1 and found["chosen is rejected"] == 1


def test_data_of_another_tokenizer_is_refused(tmp_path, data):
    check_tokenizer(str(data), load_tokenizer(str(data.parent / "model")))
    other = json.loads((data.parent / "model" / "tokenizer.json").read_text())
    other["model"]["vocab"]["zzz"] = len(other["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="was prepared with another tokenizer than data.tokenizer="):
        check_tokenizer(str(data), load_tokenizer(str(tmp_path / "tokenizer.json")))


def begin(folder, data, *words):
    config = compose_config(pair_run(folder, data, *words))
    resolve(config, 1)
    loader = Loader(config, Mesh.single().data)
    hook = ReferenceHook(config, loader)
    folder.mkdir(exist_ok=True)
    trainer = build_trainer(config, Mesh.single(), folder, batch_source=loader, hooks=[hook])
    return trainer, hook, loader


def end(trainer):
    trainer.checkpoints.close()
    trainer.batch_source.close()


def test_the_reference_is_scored_once_and_kept_with_what_it_is_of(tmp_path, data):
    trainer, hook, loader = begin(tmp_path / "a", data)
    hook.on_train_start(trainer)
    (place,) = data.parent.glob("*.reference-*.npz")
    written, scores = place.stat().st_mtime_ns, loader.sources[0].reference
    assert (scores < 0).all() and len(scores) == TokenFile(str(data)).num_documents
    again, other, loader = begin(tmp_path / "b", data)
    other.on_train_start(again)
    assert place.stat().st_mtime_ns == written and np.array_equal(loader.sources[0].reference, scores)
    elsewhere, third, _ = begin(tmp_path / "c", data, "train.seed=99")  # other weights
    third.on_train_start(elsewhere)
    assert len(list(data.parent.glob("*.reference-*.npz"))) == 2 and third.weights != hook.weights
    for one in (trainer, again, elsewhere):
        end(one)


def test_a_run_that_goes_on_keeps_its_first_reference(tmp_path, data):
    trainer, hook, loader = begin(tmp_path / "a", data)
    hook.on_train_start(trainer)
    scores = loader.sources[0].reference
    trainer.train_step()
    later, again, loader = begin(tmp_path / "b", data)
    later.step = 1
    again.load_state_dict(hook.state_dict())
    again.on_train_start(later)
    assert np.array_equal(loader.sources[0].reference, scores)
    for path in data.parent.glob("*.reference-*.npz"):
        path.write_bytes(b"torn")
    with pytest.raises(ConfigError, match=re.escape("is not there, or is of other data: the reference of this run")):
        again.on_train_start(later)
    again.weights = None
    with pytest.raises(ConfigError, match="the checkpoint of step 1 knows no reference"):
        again.on_train_start(later)
    for one in (trainer, later):
        end(one)
