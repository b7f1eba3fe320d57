"""How long and in what batches a run trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megalm.config.effects import Aside, Course, Layout, Measured, Order
from megalm.config.fields import choice, number
from megalm.config.model import ModelConfig

BATCH_TOKENS = ((100e6, 2**13), (1e9, 2**19), (3e9, 2**20), (30e9, 2**21), (float("inf"), 2**22))
"""(parameters below, tokens in a batch): GPT-3's sizes in powers of two; below 100M what a laptop's run takes."""


@dataclass
class TrainConfig:
    """Length, batch sizes and rhythm of a run."""

    steps: Course[int | None] = number(None, at_least=1)
    """Updates to make; None: as many as `tokens` asks for."""
    tokens: Aside[float | None] = number(None, at_least=1)
    """Tokens to train on, in place of steps (1e9 for example); both None: 20 a parameter (Hoffmann et al. 2022)."""
    global_batch_size: Order[int] = number(0, at_least=0)
    """Sequences in one update, over all ranks; 0: by the model's size, as in GPT-3 (Brown et al. 2020, table 2.1)."""
    micro_batch_size: Layout[int] = number(0, at_least=0)
    """Sequences in one forward pass of one data rank; 0: 8, and 1 for models from a billion parameters."""
    seed: Order[int] = number(1234, at_least=0, at_most=2**63 - 1)
    """Decides the initial weights, the data order and dropout."""
    log_every: Aside[int] = number(10, at_least=0)
    """Steps between lines on the console (metrics.jsonl has every step)."""
    eval_every: Aside[int] = number(100, at_least=0)
    """Steps between evaluations on held-out documents; 0: only at the end."""
    eval_sequences: Measured[int] = number(64, at_least=0)
    """Held-out sequences in one evaluation; 0: none."""
    determinism: Layout[str] = choice("strict", "fast")
    """strict: only algorithms whose result does not change from run to run, so that the guard can tell a machine's fault by
    computing a step again; fast: those of a GPU that add in an order that changes, too, and no replay."""
    sample: Aside[bool] = True
    """Let the model write a paragraph at the end."""
    sample_prompt: Aside[str] = "The "
    """What the paragraph begins with."""
    sample_tokens: Aside[int] = number(160, at_least=0)
    """Tokens of the paragraph."""

    micro_batch_chosen: ClassVar[bool] = False
    """True on an instance whose micro_batch_size nobody gave: it may still become smaller for the layout."""

    def fill_in(self, model: ModelConfig, phase_batches: Sequence[int] = ()) -> None:
        """Replace each 0 by what it stands for.

        phase_batches: the global batch sizes of a curriculum's phases, which the micro-batch must divide too.
        """
        size = model.approximate_parameters
        if self.micro_batch_size == 0:
            self.micro_batch_chosen = True  # type: ignore[misc]
            self.micro_batch_size = 8 if size < 1e9 else 1
            batches = [*([self.global_batch_size] if self.global_batch_size else []), *phase_batches]
            self.fit_micro_batch(batches, 1)
        if self.global_batch_size == 0:
            tokens = next(tokens for limit, tokens in BATCH_TOKENS if size < limit)
            micro_batches = max(1, tokens // (model.seq_length * max(1, self.micro_batch_size)))
            self.global_batch_size = micro_batches * self.micro_batch_size

    def fit_micro_batch(self, batches: Sequence[int], data_ranks: int) -> None:
        """Where nobody gave the micro-batch: make it divide all these global batches, with one at least for each data rank."""
        if not self.micro_batch_chosen:
            return
        fitting = (
            size
            for size in range(self.micro_batch_size, 0, -1)
            if all(batch % size == 0 and batch // size >= data_ranks for batch in batches)
        )
        self.micro_batch_size = next(fitting, self.micro_batch_size)
