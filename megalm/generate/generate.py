"""Writing one text with a model: sampling token by token, with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from megalm.config.errors import ConfigError
from megalm.generate.batch import generate_batch
from megalm.generate.sampling import Sampling
from megalm.model.transformer import Transformer
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
    on_token: Callable[[int], object] | None = None,
) -> list[int]:
    """The tokens that follow `tokens` (at least one), up to `max_tokens` of them or until one of `stop`, which is not
    included; see `generate_batch`, and `Sampling` for how they are drawn. on_token is told of each token as it comes.
    """

    def tell(_: int, token: int) -> None:
        if on_token is not None:
            on_token(token)

    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    prompt = [int(token) for token in tokens]
    return generate_batch(model, [prompt], sampling, stop=stop, never=never, on_token=tell)[0].tokens


def tokenize_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
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


def tokenize_unfinished(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt's ids without the end token that some tokenizers put behind every text: it goes on. Errors: as above"""
    ids = tokenize_prompt(tokenizer, text).ids
    control = tokenizer.control
    return ids[:-1] if control.add_end and len(ids) > 1 and ids[-1] == control.end else ids
