"""A paragraph that the model writes when its training is done."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megalm.config.errors import ConfigError
from megalm.generate.generate import generate, tokenize_prompt
from megalm.tokenizer.tokenizer import load_tokenizer
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

log = logging.getLogger(__name__)


class SampleHook(Hook):
    """Writes `sample.txt` and prints it. Attached on every rank, since the tensor ranks write together.

    A model that is cut over pipeline, context or data ranks, or runs with sequence parallelism, is left to
    tools.generate, which loads the checkpoint whole.
    """

    def __init__(self, folder: Path, console: Console | None) -> None:
        self.folder, self.console = folder, console

    def on_train_end(self, trainer: "Trainer", status: int) -> None:
        config, mesh = trainer.config, trainer.mesh
        if status != 0 or config.data.tokenizer is None or mesh.data.rank != 0:
            return
        whole = mesh.pipeline.size == mesh.context.size == len(trainer.model_chunks) == 1
        if not whole or config.parallel.sequence or config.parallel.data_mode == "fully_shard":
            self._print(f"\nto read what it writes: megalm generate {self.folder} --prompt 'The '")
            return
        trainer.optimizer.wait_weights()
        tokenizer = load_tokenizer(config.data.tokenizer)
        try:
            prompt = tokenize_prompt(tokenizer, config.train.sample_prompt)
            written = generate(
                trainer.model_chunks[0],
                prompt.ids,
                max_tokens=config.train.sample_tokens,
                temperature=0.7,
                top_p=0.95,
                seed=config.train.seed,
                never=tokenizer.unknown_ids(config.model.vocab_size),
            )
        except ConfigError as error:  # a run that is done is not undone by its sample
            self._print(f"\nno sample of what the model writes: {error}")
            return
        text = tokenizer.decode([*prompt.ids[prompt.added :], *written])
        if trainer.is_writer:
            try:
                (self.folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                log.warning("sample.txt cannot be written: %s", error)
        self._print("\nwhat the model writes:\n")
        self._print(text)

    def _print(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False)
