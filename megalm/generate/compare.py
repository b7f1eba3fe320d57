"""Whether two folders hold the same function: logits of a text, each side run by the best means there is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from megalm.convert.formats import detect, open_source
from megalm.convert.huggingface_settings import EVERYTHING
from megalm.generate.model import build_model, compute_logits

LENGTH = 128
"""Tokens compared: enough for positions and the causal mask to matter, few enough for a large model on a CPU."""


def sample_tokens(vocab_size: int, seq_length: int) -> Tensor:
    """Token ids [1, S], the same ones every time, all over the vocabulary."""
    length = min(LENGTH, seq_length)
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def run(path: Path, tokens: Tensor, *, vocab_size: int | None = None) -> tuple[Tensor, str]:
    """Logits fp32 [1, S, V] of the folder's model, and what computed them.

    A Hugging Face folder is run by transformers where it is installed, so that the two sides share no code.
    """
    if detect(path) == "huggingface" and importlib.util.find_spec("transformers"):
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            return model.eval()(tokens).logits.float(), "transformers"
    vocab_size = vocab_size if detect(path) == "megatron" else None
    source = open_source(path, vocab_size=vocab_size, accept=EVERYTHING)  # whoever converts it has accepted it
    return compute_logits(build_model(source.model, source.weights), tokens), "megalm"


def measure_largest_difference(
    source: Path, target: Path, *, vocab_size: int, seq_length: int
) -> tuple[float, str, str]:
    """Measure largest |difference| of the logits of the two folders' models, and what computed each."""
    tokens = sample_tokens(vocab_size, seq_length)
    first, first_by = run(source, tokens, vocab_size=vocab_size)
    second, second_by = run(target, tokens, vocab_size=vocab_size)
    return float((first - second).abs().max()), first_by, second_by
