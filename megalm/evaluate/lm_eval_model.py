"""A model of ours inside lm-eval: any of its tasks, by the scorer that the native tasks use.

Import this module where lm-eval is installed (`pip install megalm[eval]`): it registers the model type `megalm`, with
`model_args` path=FOLDER, and optionally tokenizer=FILE, device, dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from megalm.config.errors import ConfigError
from megalm.evaluate.evaluation import DTYPES, Model
from megalm.evaluate.item import Task
from megalm.evaluate.request import Request, cut_left, roll, start_token
from megalm.evaluate.scoring import TOKENS
from megalm.tokenizer.chat import find_chat_template


@register_model("megalm")
class MegalmLM(TemplateLM):
    """lm-eval's language model over a run, a checkpoint or another library's folder."""

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_tokens: int = TOKENS,
        **ignored: Any,
    ) -> None:
        """ignored: what lm-eval hands to every model (batch_size, max_batch_size): batches are made by tokens here.

        Errors: ConfigError for what is no model
        """
        super().__init__()
        unknown = set(ignored) - {"batch_size", "max_batch_size"}
        if unknown or dtype not in DTYPES:
            wrong = f"dtype={dtype}" if dtype not in DTYPES else min(unknown)
            raise ConfigError(
                f"model_args: {wrong} is not known; there are path, tokenizer, device, dtype, batch_tokens"
            )
        if device is None or (
            device.startswith("cuda") and not torch.cuda.is_available()
        ):  # lm-eval's default is a GPU
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Model.load(
            Path(path),
            tokenizer=Path(tokenizer) if tokenizer else None,
            device=device,
            dtype=dtype,
            tokens=int(batch_tokens),
        )
        self._name = Path(path).resolve().name

    @property
    def max_length(self) -> int:
        return self.model.length

    @property
    def eot_token_id(self) -> int:
        end = self.model.tokenizer.eos_id
        return start_token(self.model.tokenizer) if end is None else end

    @property
    def prefix_token_id(self) -> int:
        return start_token(self.model.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return f"{self._name}-{self.model.tokenizer.fingerprint()[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokenizer = self.model.tokenizer
        return tokenizer.encode(string).tolist() if add_special_tokens is False else tokenizer.encode_prompt(string).ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return find_chat_template(self.model.tokenizer).template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return find_chat_template(self.model.tokenizer).render(chat_history, answer=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [
            cut_left(context, continuation, self.max_length + 1, f"{text[0][-40:]!r}")
            for text, context, continuation in requests
        ]
        scores = self.model.scorer.score(asked)
        for (text, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, (score.log_probability, score.likeliest))
        return [(score.log_probability, score.likeliest) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [roll(self.tok_encode(one.args[0]), self.prefix_token_id, self.max_length) for one in requests]
        scores = iter(self.model.scorer.score([window for each in windows for window in each]))
        return [sum(next(scores).log_probability for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, one in enumerate(requests):
            settings = one.args[1]
            if settings.get("do_sample") and settings.get("temperature", 1.0):
                raise ConfigError("generation_kwargs.do_sample: only the likeliest text is written here")
            until = settings.get("until") or []
            stop = tuple([until] if isinstance(until, str) else until)
            groups.setdefault((int(settings.get("max_gen_toks", 256)), stop), []).append(number)
        for (most, stop), numbers in groups.items():
            task = Task("lm-eval", "generate", (), stop=stop, max_tokens=most)
            room = max(1, self.max_length - most)
            prompts = [
                Request(tuple(self.tok_encode(requests[n].args[0])[-room:] or [self.prefix_token_id]), 0)
                for n in numbers
            ]
            for number, text in zip(numbers, self.model.write(prompts, task), strict=True):
                texts[number] = text
        return texts
