"""A chat model comes in, is trained on by the command that the import prints, and leaves as the chat model that it was."""

import json
import shlex

from tests.assembled.runs import start
from tests.convert.architectures import transformers
from tests.convert.chat_model import check_same_chat_model, make_chat_model
from tests.texts import sentences


def commands(shown: str) -> dict[str, list[str]]:
    """The words of the commands that an import prints, by what they are for."""
    lines = [line.partition(": megalm ") for line in shown.splitlines()]
    return {name: ["megalm", *shlex.split(words)] for name, separator, words in lines if separator}


def test_a_chat_model_stays_one_through_import_training_and_export(tmp_path):
    original, exported = tmp_path / "chat", tmp_path / "exported"
    make_chat_model(original, "files")
    status, shown, errors = start("tools.convert", str(original), str(tmp_path / "runs" / "chat"), "--to", "megalm")
    assert status == 0, errors
    printed = commands(shown)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentences(i, 12)}) + "\n" for i in range(60)))
    place = str(tmp_path / "mine")
    for name, more in (
        ("tokenize", ["--workers", "1"]),
        ("train on", [
            f"run.dir={tmp_path}/runs", "run.name=on", "device=cpu", "train.steps=3", "train.global_batch_size=2",
            "train.micro_batch_size=2", "train.eval_sequences=0", "train.eval_every=0", "train.sample_tokens=4",
            "optim.warmup_steps=1", "world_size=1",
        ]),
    ):  # fmt: skip
        module, *words = [word.replace("TEXT", str(text)).replace("data/mine", place) for word in printed[name]]
        status, shown, errors = start(module, *words, *more)
        assert status == 0, shown + errors
    status, _, errors = start("tools.convert", str(tmp_path / "runs" / "on"), str(exported), "--to", "huggingface")
    assert status == 0, errors

    check_same_chat_model(original, exported, "files")
    card = (exported / "README.md").read_text()
    assert f"| data | {place}_text_document |" in card and "| tokens | 384 in 3 steps" in card and "megalm 0." in card
    weights = [
        transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in (original, exported)
    ]
    assert not weights[0].equal(weights[1])  # it was trained
