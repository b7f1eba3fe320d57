"""Many texts at once are the texts that would have been written alone."""

import pytest
import torch

from megalm.config import ModelConfig, ParallelConfig
from megalm.config.errors import ConfigError
from megalm.data.batch import Batch
from megalm.generate.batch import compute_next_logits, generate_batch
from megalm.generate.generate import generate
from megalm.generate.sampling import Sampling
from megalm.generate.text import TextStream
from megalm.model.cache import keep_cache, select_rows
from megalm.model.transformer import Transformer
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import build_mesh
from tests.distributed import run_ranks
from tests.generate.test_generate import MODELS, SMALL, make

PROMPTS = [[3, 1, 4], [1], list(range(40, 47)), [5, 9, 2, 6, 5], [49] * 15, list(range(16)), list(range(30))]
"""Shorter than the window of 16, as long, and longer."""


def trained_logits(model: Transformer, text: list[int]) -> torch.Tensor:
    """Logits after the text, by the forward pass that training makes."""
    tokens = torch.tensor([text])
    batch = Batch(tokens=tokens, labels=tokens)
    with torch.no_grad():
        return model.head.logits(model.run_layers(model.embed(batch), batch))[-1, 0, :50].float()


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_different_lengths_have_the_logits_of_training(name):
    model = make(name)
    texts = [[7, 3, 9, 1, 1, 4, 20], [2], [30, 31, 32, 33]]
    longest = max(map(len, texts))
    begin = torch.tensor([longest - len(text) for text in texts])
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    seen = []  # (text, logits), compared when the caches are gone
    with torch.no_grad(), keep_cache(model, 16):
        seen += zip(texts, compute_next_logits(model, tokens, 0, begin), strict=True)
        for step in range(3):
            kept = torch.tensor([2, 0] if step == 1 else range(len(texts)))
            texts, begin = [texts[i] for i in kept], begin[kept]
            select_rows(model, kept)
            texts = [[*text, (11 * i + step) % 50] for i, text in enumerate(texts)]
            last = torch.tensor([text[-1:] for text in texts])
            seen += zip(texts, compute_next_logits(model, last, longest + step, begin), strict=True)
    assert len(seen) == 3 + 3 + 2 + 2
    for text, logits in seen:
        torch.testing.assert_close(logits, trained_logits(model, text), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_a_text_is_the_same_beside_others_and_alone(name, rows):
    model = make(name)
    settings = [Sampling(12 + 3 * i, 1.3, 0, 0.95, seed=i) for i in range(len(PROMPTS))]
    together = generate_batch(model, PROMPTS, settings, rows=rows, stop={17})
    for prompt, one, written in zip(PROMPTS, settings, together, strict=True):
        alone = generate(
            model, prompt, max_tokens=one.max_tokens, temperature=1.3, top_p=0.95, seed=one.seed, stop={17}
        )
        assert written.tokens == alone
        assert written.reason == ("length" if len(alone) == one.max_tokens else "stop")


def test_log_probabilities_are_the_models_whatever_the_temperature():
    model = make("llama")
    for written, prompt in zip(generate_batch(model, PROMPTS[:4], Sampling(6, 2.0, 5, 0.9)), PROMPTS[:4], strict=True):
        text = list(prompt)
        for token, found in zip(written.tokens, written.log_probabilities, strict=True):
            expected = trained_logits(model, text[-16:]).log_softmax(0)[token]
            assert found == pytest.approx(float(expected), abs=1e-5)
            text.append(token)


def test_who_listens_ends_a_text_and_no_other():
    model = make("olmo2")
    whole = [each.tokens for each in generate_batch(model, PROMPTS[:3], Sampling(9, 1.0))]
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def listen(which: int, token: int) -> bool:
        seen[which].append(token)
        return which == 1 and len(seen[1]) == 4

    found = generate_batch(model, PROMPTS[:3], Sampling(9, 1.0), on_token=listen)
    assert [each.tokens for each in found] == [whole[0], whole[1][:4], whole[2]] == list(seen.values())
    assert [each.reason for each in found] == ["length", "stop", "length"]


def write_on_ranks() -> list[list[int]]:
    config = ModelConfig(**{**SMALL, **MODELS["llama"]})
    config.fill_in()
    parallel = ParallelConfig(tensor=2)
    model = Transformer(config, LayerContext(build_mesh(parallel, "cpu"), parallel, device="cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    return [each.tokens for each in generate_batch(model, PROMPTS, Sampling(8, 1.0))]


def test_tensor_ranks_write_the_same_texts():
    first, second = run_ranks(2, write_on_ranks)
    assert first == second
    assert len({tuple(each) for each in first}) == len(PROMPTS)


def test_bad_settings_and_prompts_are_refused():
    model = make("llama")
    with pytest.raises(ConfigError, match="top-p"):
        generate_batch(model, [[1], [2]], [Sampling(), Sampling(top_p=2.0)])
    with pytest.raises(ConfigError, match="64 bits"):
        generate_batch(model, [[1]], Sampling(seed=2**70))
    with pytest.raises(ValueError, match="at least one token"):
        generate_batch(model, [[1], []])
    assert generate_batch(model, []) == []


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\ntwo\n\nthree", ["\n\n"], "one\ntwo"),
        ("abcabd.", ["abd"], "abc"),
        ("naïve 🙂 end", [" end"], "naïve 🙂"),
        ("Question: x", ["Question:", "Q"], ""),
        ("aaab", ["aab"], "a"),
        ("no stop in it", ["zzz", ""], "no stop in it"),
        ("ends with a beginning \n", ["\n\n"], "ends with a beginning \n"),
        ("x" * 40 + "STOP" + "y", ["STOP"], "x" * 40),
    ],
)
def test_streamed_text_ends_before_the_stop_string_and_shows_nothing_of_it(text, stop, expected):
    stream = TextStream(Letters(), list(b"prompt "), stop)
    shown = []
    for byte in text.encode():
        shown.append(stream.add(byte))
        assert "\N{REPLACEMENT CHARACTER}" not in shown[-1]
        if stream.stopped:
            break
    shown.append(stream.finish())
    assert "".join(shown) == stream.text == expected
