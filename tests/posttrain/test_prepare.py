"""Instruction data to tokens and targets: what is learned, what is refused, and the same run on every layout."""

import json

import numpy as np
import pytest
import torch
import transformers

import tools.posttrain
from megalm.config.errors import ConfigError
from megalm.data.tokens import TokenFile
from megalm.posttrain.prepare import prepare
from megalm.posttrain.records import BadRecord, parse_record, read_records
from megalm.posttrain.render import Renderer
from megalm.tokenizer.chat import ChatTemplate, find_chat_template
from megalm.tokenizer.tokenizer import load_tokenizer
from tests.convert.chat_model import TEMPLATE, make_chat_model
from tests.train.layouts import same_on_every_layout
from tools.subcommands import run_tool

MARKED = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a test"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "it ends"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_chat_model(folder, "files")
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(str(model))


def renderer(tokenizer, template=TEMPLATE):
    return Renderer(ChatTemplate(template, find_chat_template(tokenizer).tokens), tokenizer)


def learned(tokenizer, rendered):
    """The stretches that are learned, as texts."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.weights > 0, [0]])))
    return [tokenizer.decode(rendered.ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


def write(folder, records, name="data.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_assistants_words_and_what_ends_them_are_learned(tokenizer, template):
    rendered = renderer(tokenizer, template).render(parse_record({"messages": TALK}, "x"))
    assert learned(tokenizer, rendered) == ["a test<|im_end|>", "it ends<|im_end|>"]
    assert rendered.ids[0] == tokenizer.control.begin != rendered.ids[1], (
        "the template writes the begin token, nobody else"
    )


def test_tokens_and_targets_are_those_of_transformers(model, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    theirs.chat_template = MARKED
    wanted = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    rendered = renderer(tokenizer, MARKED).render(parse_record({"messages": TALK}, "x"))
    assert rendered.ids.tolist() == wanted["input_ids"]
    assert (rendered.weights > 0).astype(int).tolist() == wanted["assistant_masks"]


def test_each_turn_counts_what_it_is_given(tokenizer):
    talk = [dict(message) for message in TALK]
    talk[2]["weight"], talk[4]["weight"] = 0, 0.5
    rendered = renderer(tokenizer).render(parse_record({"messages": talk}, "x"))
    assert learned(tokenizer, rendered) == ["it ends<|im_end|>"] and set(rendered.weights.tolist()) == {0.0, 0.5}


def test_a_message_that_spells_a_control_token_is_text(tokenizer):
    talk = [{"role": "user", "content": "say <|im_end|> now"}, {"role": "assistant", "content": "<|im_start|>"}]
    rendered = renderer(tokenizer).render(parse_record({"messages": talk}, "x"))
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    ids = rendered.ids.tolist()
    assert (ids.count(start), ids.count(end)) == (2, 2), "one of each for a message, none for what it says"
    assert tokenizer.decode(ids).count("<|im_end|>") == 3 and learned(tokenizer, rendered) == ["<|im_start|><|im_end|>"]


def test_prompts_with_completions_and_texts(tokenizer):
    made = renderer(tokenizer)
    pair = made.render(parse_record({"prompt": "two and two: ", "completion": "four"}, "x"))
    assert learned(tokenizer, pair) == [f"four{tokenizer.name_of(tokenizer.eos_id)}"]
    text = made.render(parse_record({"text": "a whole text"}, "x"))
    assert text.targets == len(text.ids) - 1 and text.ids[0] == tokenizer.control.begin
    lists = parse_record({"prompt": TALK[:2], "completion": TALK[2:3]}, "x")
    assert learned(tokenizer, made.render(lists)) == ["a test<|im_end|>"]


def test_sharegpts_turns_are_messages():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    record = parse_record({"conversations": turns}, "x")
    assert [message["role"] for message in record.messages] == ["user", "assistant"] and record.weights == (0.0, 1.0)


def test_without_a_template_a_plain_transcript_ends_as_a_document(tokenizer):
    rendered = renderer(tokenizer, None).render(parse_record({"messages": TALK[1:3]}, "x"))
    assert learned(tokenizer, rendered) == [f" a test{tokenizer.name_of(tokenizer.eos_id)}"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([1, 2], "is list, not an object"),
        ({"question": "a"}, "has question: needed is messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 1: its role must be one of"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing in it is to be learned"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "nothing in it is to be learned"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": "much"}]}, "message 1 has the weight 'much'"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "turn 1 is from 'cat'"),
        ({"prompt": "a"}, "prompt and completion must both be"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"text": ""}, "text is ''"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused_with_its_place(record, words):
    with pytest.raises(ConfigError, match=words) as raised:
        parse_record(record, "file line 3")
    assert str(raised.value).startswith("file line 3: ")


def test_a_template_that_writes_earlier_messages_otherwise_is_refused(tokenizer):
    forgetful = "{% for m in messages %}[{{ messages|length }}]{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(BadRecord, match="x: what of the conversation is the assistant's cannot be told.*generation"):
        renderer(tokenizer, forgetful).render(parse_record({"messages": TALK}, "x"))


def test_broken_lines_are_named_and_the_others_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n{"text": \n\xff\xfe{}\n\n{"text": "two"}\n')
    found = list(read_records(file))
    assert [str(one).partition(":")[0].rpartition(" ")[2] for one in found if isinstance(one, BadRecord)] == ["2", "3"]
    assert [one.text for one in found if not isinstance(one, BadRecord)] == ["one", "two"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, kind):
    records = [{"messages": TALK}, {"messages": TALK[:3]}]
    file = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), file)
    else:
        file.write_text(json.dumps(records) if kind == "json" else "".join(json.dumps(r) + "\n" for r in records))
    found = list(read_records(file))
    assert [[dict(m) for m in one.messages] for one in found] == [TALK, TALK[:3]]


def test_files_are_made_once_for_the_same_data_template_and_tokenizer(tmp_path, model):
    file, prefix = write(tmp_path, [{"messages": TALK}] * 3), str(tmp_path / "made")
    first = prepare([file], str(model), prefix)
    assert (first.records, first.reused) == (3, False)
    tokens = TokenFile(prefix)
    assert tokens.num_documents == 3 and int(np.count_nonzero(tokens.targets)) == first.targets
    assert prepare([file], str(model), prefix).reused
    write(tmp_path, [{"messages": TALK}] * 4)
    again = prepare([file], str(model), prefix)
    assert (again.records, again.reused) == (4, False)
    template = tmp_path / "t.jinja"
    template.write_text(MARKED)
    assert not prepare([file], str(model), prefix, template_file=str(template)).reused


def test_bad_records_stop_the_work_or_are_counted(tmp_path, model, capsys):
    file = write(tmp_path, [{"messages": TALK}, {"messages": TALK[:2]}, {"text": "more"}])
    words = ["prepare", file, "--tokenizer", str(model), "--output", str(tmp_path / "made")]
    assert run_tool(tools.posttrain, words) == 2
    assert (
        f"{file} line 2: nothing in it is to be learned" in (said := capsys.readouterr().err) and "--skip-bad" in said
    )
    assert not list(tmp_path.glob("made*"))
    assert run_tool(tools.posttrain, [*words, "--skip-bad", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["records"] == 2 and len(made["left_out"]) == 1
    assert run_tool(tools.posttrain, ["look", str(tmp_path / "made"), "--tokenizer", str(model), "--sample", "2"]) == 0
    assert "⟦a test<|im_end|>⟧" in capsys.readouterr().out


def test_long_records_lose_their_end_and_those_without_a_target_are_named(tmp_path, model):
    file = write(tmp_path, [{"messages": TALK}, {"prompt": "long " * 60, "completion": "x"}])
    made = prepare([file], str(model), str(tmp_path / "made"), max_length=70, skip_bad=True)
    assert made.cut == 2 and made.records == 1 and "all its targets lie behind 70 tokens" in made.left_out[0]


def test_weights_that_do_not_fit_the_tokens_are_refused(tmp_path, model):
    prefix = str(tmp_path / "made")
    prepare([write(tmp_path, [{"messages": TALK}])], str(model), prefix)
    with open(f"{prefix}.targets", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ConfigError, match="cut off, or of other tokens"):
        TokenFile(prefix)


def talks(folder, model):
    random = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "five", "six"]
    records = []
    for _ in range(120):
        said = " ".join(random.choice(words, random.integers(1, 4)))
        records.append(
            {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said.upper()}]}
        )
    prefix = str(folder / "talks")
    prepare([write(folder, records)], str(model), prefix)
    return prefix


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "context", "data"])
def test_fine_tuning_is_the_same_run_on_every_layout(tmp_path, model, axis, monkeypatch):
    prefix = talks(tmp_path, model)
    monkeypatch.setattr(
        "tests.train.layouts.small_run",
        lambda folder, *words: small(folder, prefix, *words),
    )
    steps = same_on_every_layout(tmp_path, axis, ("loss", "grad_norm", "tokens"))
    assert steps[-1][0] < steps[0][0]


def small(folder, prefix, *words):
    from tests.small_run import small_run

    return [
        *small_run(
            folder, "model.vocab_size=320", "data.packing=best_fit", f"data.train=[{prefix}]", "model.seq_length=64"
        ),
        *words,
    ]


def test_the_loss_is_that_of_the_targets_alone(tmp_path, model):
    """Packed into rows with others, each record gives the sum that it gives by itself."""
    from megalm.config.compose import compose_config
    from megalm.data.loader import Loader
    from megalm.generate.model import compute_logits
    from megalm.launch.resolve import resolve
    from megalm.model.transformer import Transformer
    from megalm.objectives.next_token import NextToken
    from megalm.parallel.layer_context import LayerContext
    from megalm.parallel.mesh import Mesh

    prefix = talks(tmp_path, model)
    config = compose_config(small(tmp_path, prefix, "train.global_batch_size=4", "train.micro_batch_size=4"))
    resolve(config, 1)
    network = Transformer(config.model, LayerContext(Mesh.single()), objective=NextToken())
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    loader = Loader(config, Mesh.single().data)
    (batch,) = loader.next()
    loader.close()
    assert batch.loss_mask.sum() < 0.7 * batch.tokens.numel()
    _, packed = network(None, batch)
    tokens = TokenFile(prefix)
    total = count = 0.0
    for row in range(4):
        for document in batch.document_ids[row].unique().tolist():
            inside = batch.document_ids[row] == document
            ids, weights = batch.tokens[row][inside], batch.loss_mask[row][inside]
            if not weights.any():
                continue
            logits = compute_logits(network, ids[None])[0]
            losses = torch.nn.functional.cross_entropy(logits, batch.labels[row][inside], reduction="none")
            total += float((losses * weights).sum())
            count += float(weights.sum())
    assert tokens.targets is not None
    assert float(packed["tokens"]) == count and float(packed["loss"]) == pytest.approx(total, rel=1e-5)
