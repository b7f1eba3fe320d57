"""A suite asked of a run while it trains, on its own layout, with the weights as they stand after a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megalm.architecture.products import choose_fp8_products
from megalm.config import Config
from megalm.config.errors import ConfigError
from megalm.config.precision import find_multiple
from megalm.evaluate.item import WRITTEN, Task
from megalm.evaluate.measure import TaskResult, evaluate_task
from megalm.evaluate.protocols import find_protocol
from megalm.evaluate.results import Identity, ResultFolder, average
from megalm.evaluate.scoring import Scorer
from megalm.evaluate.tasks.suite import read_suite
from megalm.tokenizer.tokenizer import load_tokenizer
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer


class SuiteHook(Hook):
    """Adds `eval/TASK/FIGURE`, its `_stderr`, and `eval/average` to the record of every `evaluate.every`-th step and the last.

    Attached on every rank, since all of them compute. Each item's scores go to the run's folder `evaluation`. What a model
    writes is left to `megalm evaluate`, which loads the checkpoint whole.

    Errors: ConfigError for a suite that is not there, or a run without a tokenizer
    """

    def __init__(self, config: Config, folder: Path, console: Console | None) -> None:
        settings = config.evaluate
        if config.data.tokenizer is None:
            raise ConfigError(
                "evaluate.every asks for tasks, which are texts, and the run has no tokenizer: set data.tokenizer, or "
                "evaluate.every=0."
            )
        self.config, self.folder, self.console = config, folder / "evaluation", console
        self.every, self.limit = settings.every, settings.limit or None
        self.suite = read_suite(settings.suite, Path(settings.data))
        self.protocol = find_protocol(self.suite.protocol if settings.protocol == "auto" else settings.protocol)
        self.tasks = [task for task in self.suite.tasks if task.kind not in WRITTEN]
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        if not self.tasks:
            raise ConfigError(
                f"evaluate.suite={settings.suite}: a model only writes in it, which a run cannot evaluate: megalm evaluate can"
            )
        for task in self.tasks:  # an item that cannot be asked is said now, not at the first evaluation
            for _ in self.protocol.prompts(task, self.tokenizer, config.model.seq_length, self.limit):
                pass

    def on_train_start(self, trainer: Trainer) -> None:
        """Say what is asked, and what it will cost."""
        tokens = self._count_tokens()
        train = self.config.train
        share = tokens / (3 * self.every * train.global_batch_size * self.config.model.seq_length)
        items = sum(len(task.items[: self.limit]) for task in self.tasks)
        left_out = [task.name for task in self.suite.tasks if task.kind in WRITTEN]
        beside = f"; {', '.join(left_out)}: left to megalm evaluate, for what a model writes" if left_out else ""
        self._print(
            f"evaluation: {self.suite.name} by the protocol {self.protocol.name}, {items:,} items, {tokens:,} tokens every "
            f"{self.every} steps, about {100 * share:.1f}% of the training's arithmetic{beside}"
        )

    def on_step_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Ask the suite where it is due; a step that the guard has taken back is not asked."""
        step = record["step"]
        if trainer.step != step or (step % self.every and step != trainer.total_steps):
            return
        begun = time.perf_counter()
        scorer = self.make_scorer(trainer)
        results = [evaluate_task(task, self.protocol, scorer, self.tokenizer, limit=self.limit) for task in self.tasks]
        record.update(name_figures(results))
        seconds = time.perf_counter() - begun
        record["eval/seconds"] = seconds
        if trainer.is_writer:
            self._keep(results, step, seconds)
        shown = average(results).get("average")
        if shown is not None:
            error = f" ± {shown.error:.3f}" if shown.error else ""
            self._print(f"step {step}: {self.suite.name} above chance {shown.value:.3f}{error} in {seconds:.1f} s")

    def make_scorer(self, trainer: Trainer) -> Scorer:
        """Make what scores continuations by the weights in training, on the run's own layout."""
        fp8 = self.config.precision.fp8
        multiple = find_multiple(fp8.recipe) if choose_fp8_products(self.config.model, fp8) else 1
        length = self.config.model.seq_length
        return Scorer(
            trainer.executor, trainer.mesh, length, tokens=self.config.evaluate.batch_tokens, multiple=multiple
        )

    def _keep(self, results: list[TaskResult], step: int, seconds: float) -> None:
        """Every item's scores; what cannot be written ends no run, and metrics.jsonl has the figures."""
        identity = Identity(
            model=f"step {step}",
            suite=self.suite.name,
            protocol=self.protocol.name,
            tokenizer=self.tokenizer.fingerprint(),
            length=self.config.model.seq_length,
            limit=self.limit,
            dtype=self.config.precision.dtype,
        )
        try:
            place = ResultFolder(self.folder / f"{self.suite.name}-{self.protocol.name}-step-{step}", identity)
            for result in results:
                place.keep(result)
            place.finish(results, {"path": str(self.folder.parent), "step": step, "seconds": seconds})
        except ConfigError as error:
            self._print(f"evaluation: not written ({error})")

    def _count_tokens(self) -> int:
        def of(task: Task) -> int:
            prompts = self.protocol.prompts(task, self.tokenizer, self.config.model.seq_length, self.limit)
            return sum(len(request.ids) for prompt in prompts for request in prompt.requests)

        return sum(map(of, self.tasks))

    def _print(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False)


def name_figures(results: list[TaskResult]) -> dict[str, float]:
    """eval/TASK/FIGURE and eval/TASK/FIGURE_stderr of each, and eval/average above chance."""
    named: dict[str, float] = {}
    for result in results:
        figures = {f"{result.task}/{name}": figure for name, figure in result.figures.items()}
        for name, (value, error) in figures.items():
            named[f"eval/{name}"] = value
            if error is not None:
                named[f"eval/{name}_stderr"] = error
    for name, (value, error) in average(results).items():
        named[f"eval/{name}"] = value
        if error is not None:
            named[f"eval/{name}_stderr"] = error
    return named
