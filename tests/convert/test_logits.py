"""An imported model computes what transformers computes."""

import pytest
import torch

from megalm.convert.formats import open_source
from megalm.generate.generate import generate
from megalm.generate.model import build_model, compute_logits
from tests.convert.architectures import NAMES, build, tokens


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_every_architecture(name, tmp_path):
    peer = build(name)
    peer.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    model = build_model(source.model, source.weights)
    with torch.no_grad():
        expected = peer(tokens()).logits
    assert expected.std() > 0.5  # large enough that 1e-4 says something
    torch.testing.assert_close(compute_logits(model, tokens()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "qwen3"])
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    peer = build(name)
    peer.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    prompt = tokens(1, 5)
    settings = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = peer.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    written = generate(build_model(source.model, source.weights), prompt[0], max_tokens=20, temperature=0)
    assert written == expected[0, 5:].tolist()
