"""A suite asked of a model in this process: load, score, write down."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalm.convert.native import find_config
from megalm.convert.source import Source
from megalm.evaluate.item import Task
from megalm.evaluate.measure import TaskResult, evaluate_task
from megalm.evaluate.protocols import Protocol, find_protocol
from megalm.evaluate.request import Request
from megalm.evaluate.results import Identity, ResultFolder, digest_model
from megalm.evaluate.scoring import TOKENS, Scorer
from megalm.evaluate.sharing import SharingScorer
from megalm.evaluate.tasks.suite import Suite
from megalm.evaluate.written import MARKERS, Marker
from megalm.generate.batch import ROWS
from megalm.generate.model import load_model, open_tokenizer, stop_tokens
from megalm.generate.sampling import Sampling
from megalm.generate.text import write_texts
from megalm.model.transformer import Transformer
from megalm.tokenizer.chat import find_chat_template
from megalm.tokenizer.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A model in one process, ready to be asked."""

    source: Source
    transformer: Transformer
    tokenizer: Tokenizer
    scorer: Scorer
    length: int
    """Most tokens that it reads."""

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        tokenizer: Path | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        accept: Collection[str] = (),
        tokens: int = TOKENS,
    ) -> Model:
        """Load a run, a checkpoint or another library's folder. Errors: ConfigError for what is none"""
        source, transformer = load_model(path, device=device, dtype=DTYPES[dtype], accept=accept)
        length = source.model.seq_length
        return cls(
            source, transformer, open_tokenizer(source, tokenizer), SharingScorer(transformer, tokens=tokens), length
        )

    @property
    def home(self) -> Path:
        """Where its results go: `evaluation` in its run's folder; else below the folder that one stands in."""
        path = Path(self.source.path)
        if self.source.format == "megalm" and path.exists():
            return find_config(path).parent / "evaluation"
        return Path("evaluation") / path.resolve().name

    def write(self, requests: Sequence[Request], task: Task) -> list[str]:
        """What it writes on from each request, always the likeliest token, up to the task's stops."""
        stop = (*task.stop, *find_chat_template(self.tokenizer).stop) if task.chat else task.stop
        found = write_texts(
            self.transformer,
            self.tokenizer,
            [request.ids for request in requests],
            Sampling(max_tokens=task.max_tokens, temperature=0.0),
            stop_tokens=stop_tokens(self.source, self.tokenizer),
            stop=stop,
            rows=ROWS,
        )
        control = frozenset(self.tokenizer.control_ids())
        texts = [self.tokenizer.decode([t for t in one.written.tokens if t not in control]) for one in found]
        return [_cut(text, stop) for text in texts]  # without names of control tokens, as lm-eval reads them


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min([at for one in stop if one and (at := text.find(one)) >= 0], default=len(text))]


@dataclass(frozen=True)
class Evaluated:
    """A suite's results."""

    results: list[TaskResult]
    folder: Path
    seconds: float
    reused: list[str] = field(default_factory=list)
    """Tasks whose results were there already."""


def evaluate(
    model: Model,
    suite: Suite,
    protocol: str | None = None,
    *,
    output: Path | None = None,
    limit: int | None = None,
    markers: Mapping[str, Marker] = MARKERS,
    on_task: Callable[[TaskResult, bool], object] = lambda result, reused: None,
) -> Evaluated:
    """Ask a suite of a model; results lie in `output`, which is made, and what is there of the same is not computed again.

    protocol: by name; None: the suite's own. limit: only the first items of each task.
    markers: who judges what is written; with `Code()` for "code" what the model programs is run.
    on_task: told of each result, and whether it was there already.
    """
    how: Protocol = find_protocol(protocol or suite.protocol)
    begun = time.perf_counter()
    weight = model.transformer.embedding.weight
    identity = Identity(
        model=digest_model(model.transformer),
        suite=suite.name,
        protocol=how.name,
        tokenizer=model.tokenizer.fingerprint(),
        length=model.length,
        limit=limit,
        dtype=str(weight.dtype).removeprefix("torch."),
    )
    name = f"{suite.name}-{how.name}" + (f"-step-{model.source.step}" if model.source.step else "")
    folder = ResultFolder(output or model.home / name, identity)
    results, reused = [], []
    for task in suite.tasks:
        fewshot = 0 if task.kind == "text" else task.num_fewshot
        there = folder.find(task.name, task.digest(), fewshot)
        if there is not None:
            reused.append(task.name)
        result = there or evaluate_task(
            task, how, model.scorer, model.tokenizer, limit=limit, write=model.write, markers=markers
        )
        if there is None:
            folder.keep(result)
        results.append(result)
        on_task(result, there is not None)
    facts: dict[str, Any] = {
        "path": str(model.source.path),
        "step": model.source.step,
        "suite_sha256": suite.digest(),
        "seconds": time.perf_counter() - begun,
    }
    folder.finish(results, facts)
    return Evaluated(results, folder.folder, facts["seconds"], reused)
