"""A small chat model in a Hugging Face folder, with all the files that such folders have."""

import json
from pathlib import Path

from tests.convert.architectures import build, transformers
from tests.texts import sentences

TALK = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a test"}]
FORMS = ("string", "list", "files")
"""Where folders keep their chat templates."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<|im_end|>",
    "pad_token": "</s>",
    "unk_token": "<unk>",
    "model_max_length": 64,
}


def make_chat_model(folder: Path, form: str) -> None:
    """A small Llama whose chat template lies where `form` says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    model = build("llama2")
    model.resize_token_embeddings(300)
    model.config.eos_token_id = model.generation_config.eos_token_id = [4, 2]
    model.generation_config.update(temperature=0.7, top_p=0.9, do_sample=True, pad_token_id=2, max_new_tokens=20)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=NAMES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([sentences(i, 3) for i in range(50)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(SETTINGS)
    if form == "string":
        settings["chat_template"] = TEMPLATE
    elif form == "list":
        settings["chat_template"] = [
            {"name": "default", "template": TEMPLATE},
            {"name": "tool_use", "template": "TOOLS " + TEMPLATE},
        ]
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS " + TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    named = {key: value for key, value in SETTINGS.items() if key.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps({**named, "additional_special_tokens": ["<tool_call>"]}))
    (folder / "README.md").write_text("# The model as it was\n")


def check_same_chat_model(original: Path, exported: Path, form: str) -> None:
    """Asserts that transformers takes both folders for the same chat model, but for its weights."""
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (original, exported))
    for more in ({}, {"add_generation_prompt": True}, {"chat_template": "tool_use"} if form != "string" else {}):
        assert (
            before.apply_chat_template(TALK, **more)["input_ids"]
            == after.apply_chat_template(TALK, **more)["input_ids"]
        )
    assert before("a <tool_call> b").input_ids == after("a <tool_call> b").input_ids
    assert before.special_tokens_map == after.special_tokens_map
    configs = [transformers.AutoConfig.from_pretrained(folder) for folder in (original, exported)]
    for config in configs:
        assert (config.bos_token_id, config.eos_token_id, str(config.dtype)) == (1, [4, 2], "torch.float32")
    assert {**configs[0].to_dict(), "_name_or_path": ""} == {**configs[1].to_dict(), "_name_or_path": ""}
    first, second = (json.loads((folder / "generation_config.json").read_text()) for folder in (original, exported))
    assert first == second and first["temperature"] == 0.7
