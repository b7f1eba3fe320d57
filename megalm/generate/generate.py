"""Writing text with a model: sampling token by token, with a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.data.batch import Batch
from megalm.model.cache import cached
from megalm.model.transformer import Transformer
from megalm.parallel.collectives import all_gather
from megalm.tokenizer.tokenizer import Prompt, Tokenizer


def generate(
    model: Transformer,
    tokens: Sequence[int] | Tensor,
    *,
    max_tokens: int = 160,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
    never: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """The tokens that follow `tokens` (at least one), up to `max_tokens` of them or until one of `stop`, which is not
    included.

    temperature 0 takes the likeliest token each time. top_k > 0 keeps the k likeliest; top_p < 1 keeps the likeliest
    tokens whose probabilities reach p (Holtzman et al. 2020). The same seed gives the same text, on every tensor rank
    too.
    `never` are tokens that are not written: those that pad the vocabulary and that no tokenizer can read back.
    When the text grows longer than the model's sequence, its older half is forgotten.

    The model is a whole one (embedding, all layers, output), on one pipeline stage and without sequence or context
    parallelism.
    Comm:    all-gather of the last position's logits over the tensor axis, beside the layers' own
    """
    text = [int(token) for token in tokens]
    if not text:
        raise ValueError("generate needs at least one token to go on from")
    check_sampling(temperature, top_k, top_p)
    there = range(model.config.vocab_size)
    unwritable = torch.tensor(sorted(token for token in set(never) if token in there), dtype=torch.int64)
    if not (model.first and model.last) or model.sequence or model.context.size > 1:
        raise ValueError("generate needs a whole model, without pipeline, sequence and context parallelism")
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    window = model.config.seq_length
    training, start = model.training, len(text)
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: a mask the layers keep may serve in training later
            while len(text) - start < max_tokens:
                context = text[-window:] if len(text) < window else text[-(window - window // 2) :]
                with cached(model, window):
                    logits = next_logits(model, torch.tensor([context], device=device), 0)
                    used = len(context)
                    while True:
                        choices = logits[0].cpu().index_fill(0, unwritable, -torch.inf)
                        token = sample(choices, temperature, top_k, top_p, generator)
                        if token in stop:
                            return text[start:]
                        text.append(token)
                        if on_token is not None:
                            on_token(token)
                        if len(text) - start >= max_tokens:
                            return text[start:]
                        if used == window:
                            break
                        logits = next_logits(model, torch.tensor([[token]], device=device), used)
                        used += 1
    finally:
        model.train(training)
    return text[start:]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """ConfigError for a setting that no text can be drawn with."""
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature} must be at least 0 (always the likeliest token) and finite")
    if top_k < 0:
        raise ConfigError(f"top-k={top_k} must be at least 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top-p={top_p} must be above 0 and at most 1 (all tokens)")


def prompt_ids(tokenizer: Tokenizer, text: str) -> Prompt:
    """The prompt's ids, at least one: an empty text begins with the token that begins texts, or that ends the one before.

    ConfigError where there is no such token, or the text is not one that can be encoded.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is not UTF-8 text (at character {error.start + 1} of {text[:20]!r}...); give it in UTF-8, from "
            "standard input if the shell writes another encoding: iconv -t UTF-8"
        ) from None
    prompt = tokenizer.encode_prompt(text)
    if prompt.ids:
        return prompt
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is None:
        raise ConfigError(
            "the prompt has no tokens and the tokenizer has no token to begin a text with; give some text as the prompt"
        )
    return Prompt([start], 1)


def next_logits(model: Transformer, tokens: Tensor, position: int) -> Tensor:
    """Logits fp32 [B, V] of the token after `tokens` [B, S], whose first one stands at `position`."""
    batch_size, length = tokens.shape
    positions = torch.arange(position, position + length, device=tokens.device).expand(batch_size, length)
    batch = Batch(tokens=tokens, labels=tokens, positions=positions)
    hidden = model.run_layers(model.embed(batch), batch, seen=position)
    logits = all_gather(model.head.logits(hidden[-1:]), model.tensor, dim=-1)[0]
    return logits[:, : model.config.vocab_size].float()


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token drawn from logits fp32 [V]. The draw is made on the CPU, so that every device and rank draws the
    same."""
    logits = logits.cpu()
    if not logits.max().isfinite():
        raise ConfigError(
            f"the model's largest logit is {float(logits.max())}: its weights are damaged, or its training diverged; nothing "
            "can be written with it"
        )
    if temperature <= 0:
        return int(logits.argmax())
    logits = logits / temperature
    order = logits.argsort(descending=True, stable=True)
    probabilities = logits[order].softmax(0)
    if top_k > 0:
        probabilities[top_k:] = 0
    if top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= top_p] = 0
        probabilities[0] = max(float(probabilities[0]), torch.finfo(torch.float32).tiny)  # top_p 0 means the likeliest
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
