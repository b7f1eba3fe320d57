"""megalm from Python: what the command line does, as functions that return what it prints.

    run = megalm.train(["+model=tiny", "train.steps=200", "run.name=mine"])
    model = megalm.load(run.folder)
    model.generate("The ", max_tokens=50)
    model.logits("The sea")                       # fp32 [tokens, vocabulary]
    megalm.plan(["+model=7b", "cluster=h100", "world_size=64"]).seconds
    megalm.tokenize("my-texts/", "data/mine", train_bpe=8192)

Wrong input raises `megalm.config.errors.ConfigError` with the sentence that the command line prints.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from megalm.config import Config, ConfigError
from megalm.config.attempts import CONFIG
from megalm.config.compose import compose_config
from megalm.config.saved import load_config
from megalm.journal import read_course, read_events

if TYPE_CHECKING:
    from torch import Tensor

    from megalm.corpus.tokenize_job import Outcome
    from megalm.generate.text import WrittenText
    from megalm.plan.summary import Plan
    from megalm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Run:
    """A run's folder, and how its last start ended."""

    folder: Path
    status: int = 0
    """0 done; 1 it broke off; 3 it gave up, with a report; 130 interrupted after a checkpoint."""

    @cached_property
    def config(self) -> Config:
        """Its newest settings, every key resolved."""
        return load_config(self.folder / CONFIG)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Its steps as they count, each with the metrics of metrics.jsonl."""
        return read_course(self.folder / "metrics.jsonl").steps

    @property
    def events(self) -> list[dict[str, Any]]:
        """Everything that events.jsonl holds."""
        return read_events(self.folder / "events.jsonl")

    @property
    def losses(self) -> list[float]:
        """The training loss of each step."""
        return [step["loss"] for step in self.steps if "loss" in step]


def train(words: Sequence[str]) -> Run:
    """Train as `megalm train WORDS` does; a run that is there already goes on.

    One rank trains in this process; several are processes of their own.
    Errors: ConfigError for a wrong configuration or input; RuntimeError where the run broke off (see `run.events`).
    """
    from megalm.launch.__main__ import launch
    from megalm.launch.run_folder import run_folder
    from megalm.plan.search import expand_auto

    given = _words(words)
    folder = run_folder(compose_config(expand_auto(given)))
    status = launch(given)
    if status == 2:
        raise ConfigError(f"{folder}: the input is wrong; what was printed above says how.")
    if status == 1:
        raise RuntimeError(f"{folder}: the run broke off; what was printed above, and events.jsonl in it, say why")
    return Run(folder, status)


def plan(words: Sequence[str]) -> Plan:
    """Work out memory, time and money of a run before it starts; `.as_dict()` has all of it.

    Errors: ConfigError for a wrong configuration, or a layout that cannot be.
    """
    from megalm.launch.resolve import resolve
    from megalm.plan.machine import find_machine, resolve_precision
    from megalm.plan.search import expand_auto
    from megalm.plan.summary import plan as work_out

    config = compose_config(expand_auto(_words(words)))
    parallel = config.parallel
    axes = [
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.data if isinstance(parallel.data, int) else 1,
    ]
    product = 1
    for size in axes:
        product *= size
    world_size = config.world_size or product
    resolve(config, world_size)
    machine = find_machine(config, world_size)
    resolve_precision(config, machine)
    return work_out(config, machine)


def tokenize(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    train_bpe: int | None = None,
    field: str = "text",
    workers: int = 1,
    **settings: Any,
) -> Outcome:
    """Turn texts into a token file as `megalm tokenize INPUTS --output OUTPUT` does; nothing is done twice.

    Give a tokenizer's file or folder, or the size of a byte-pair encoding to train. `settings` are the fields of
    `megalm.corpus.tokenize_corpus.Settings` (skip_bad=True, append_eos=False, ...).
    Errors: ConfigError for input that cannot be read, and for both or neither of tokenizer and train_bpe.
    """
    from megalm.corpus.fields import unescape_template
    from megalm.corpus.tokenize_corpus import Settings
    from megalm.corpus.tokenize_job import Job, run_job

    if (tokenizer is None) == (train_bpe is None):
        raise ConfigError("give tokenizer=FILE, or train_bpe=SIZE to train one on the texts: one of them.")
    places = [inputs] if isinstance(inputs, str | PathLike) else list(inputs)
    made = Settings(tokenizer="" if tokenizer is None else str(tokenizer), field=unescape_template(field), **settings)
    return run_job(Job(tuple(map(str, places)), str(output), made, train_bpe=train_bpe, workers=workers))


def load(folder: str | PathLike[str], *, device: str = "cpu", dtype: str = "float32") -> Model:
    """Load a model: a run's folder or checkpoint, a Hugging Face folder, a Megatron-LM checkpoint.

    Errors: ConfigError for a folder that holds no model, and for an unknown dtype.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ConfigError(f"dtype={dtype!r}: one of {', '.join(dtypes)} is needed.")
    return Model(Path(folder), device, dtypes[dtype])


class Model:
    """A model with its tokenizer, ready to write and to be asked."""

    def __init__(self, folder: Path, device: str, dtype: Any) -> None:
        from megalm.generate.model import load_model

        self.source, self.transformer = load_model(folder, device=device, dtype=dtype)
        self.device = device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with it. Errors: ConfigError where none did."""
        from megalm.generate.model import open_tokenizer

        return open_tokenizer(self.source)

    @overload
    def generate(self, prompt: str, *, details: Literal[False] = False, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], *, details: Literal[False] = False, **sampling: Any) -> list[str]: ...
    @overload
    def generate(
        self, prompt: str | Sequence[str], *, details: Literal[True], **sampling: Any
    ) -> list[WrittenText]: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        stop: Collection[str] = (),
        details: bool = False,
        **sampling: Any,
    ) -> str | list[str] | list[WrittenText]:
        """Write on from a prompt, or from many at once; what follows is returned, without the prompt.

        sampling: max_tokens, temperature, top_k, top_p, seed (see `megalm.generate.sampling.Sampling`).
        details: return the tokens with their log-probabilities and the reason for the end as well.
        Errors: ConfigError for settings that no text can be drawn with.
        """
        from megalm.generate.generate import tokenize_prompt
        from megalm.generate.model import stop_tokens
        from megalm.generate.sampling import Sampling
        from megalm.generate.text import check_stop, write_texts

        unknown = set(sampling) - set(Sampling.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"{min(unknown)}: unknown; there are {', '.join(Sampling.__dataclass_fields__)}.")
        how = Sampling(**sampling)
        how.check()
        check_stop(stop)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        found = write_texts(
            self.transformer,
            self.tokenizer,
            [tokenize_prompt(self.tokenizer, text).ids for text in prompts],
            how,
            stop_tokens=stop_tokens(self.source, self.tokenizer),
            stop=stop,
        )
        if details:
            return found
        texts = [each.text for each in found]
        return texts[0] if isinstance(prompt, str) else texts

    def logits(self, text: str | Sequence[int]) -> Tensor:
        """The logits after each token of a text, or of ids: fp32 [tokens, vocabulary].

        Errors: ConfigError for more tokens than the model sees.
        """
        import torch

        from megalm.generate.generate import tokenize_prompt
        from megalm.generate.model import compute_logits

        ids = tokenize_prompt(self.tokenizer, text).ids if isinstance(text, str) else list(text)
        if not 0 < len(ids) <= self.source.model.seq_length:
            raise ConfigError(f"{len(ids)} tokens: the model sees between 1 and {self.source.model.seq_length}.")
        return compute_logits(self.transformer, torch.tensor([ids], device=self.device))[0]


def _words(words: Sequence[str]) -> list[str]:
    if isinstance(words, str):
        raise ConfigError(
            f"give a list of words, such as [{words.split()[0] if words.split() else '+model=tiny'!r}, ...]."
        )
    return list(words)
