"""How long and in what batches a run trains."""

from dataclasses import dataclass

from megalm.config.effects import Aside, Course, Layout, Measured, Order
from megalm.config.model import ModelConfig

BATCH_TOKENS = ((100e6, 2**13), (1e9, 2**19), (3e9, 2**20), (30e9, 2**21), (float("inf"), 2**22))
"""(parameters below, tokens in a batch): GPT-3's sizes in powers of two; below 100M what a laptop's run takes."""


@dataclass
class TrainConfig:
    """Length, batch sizes and rhythm of a run."""

    steps: Course[int | None] = None
    """Updates to make; None: as many as `tokens` asks for."""
    tokens: Aside[float | None] = None
    """Tokens to train on, in place of steps (1e9 for example); both None: 20 a parameter (Hoffmann et al. 2022)."""
    global_batch_size: Order[int] = 0
    """Sequences in one update, over all ranks; 0: by the model's size, as in GPT-3 (Brown et al. 2020, table 2.1)."""
    micro_batch_size: Layout[int] = 0
    """Sequences in one forward pass of one data rank; 0: 8, and 1 for models from a billion parameters."""
    seed: Order[int] = 1234
    """Decides the initial weights, the data order and dropout."""
    log_every: Aside[int] = 10
    """Steps between lines on the console (metrics.jsonl has every step)."""
    eval_every: Aside[int] = 100
    """Steps between evaluations on held-out documents; 0: only at the end."""
    eval_sequences: Measured[int] = 64
    """Held-out sequences in one evaluation; 0: none."""
    deterministic: Layout[bool] = True
    """Only algorithms whose result does not change from run to run."""
    sample: Aside[bool] = True
    """Let the model write a paragraph at the end."""
    sample_prompt: Aside[str] = "The "
    """What the paragraph begins with."""
    sample_tokens: Aside[int] = 160
    """Tokens of the paragraph."""

    def fill_in(self, model: ModelConfig) -> None:
        """Replace each 0 by what it stands for."""
        size = model.approximate_parameters
        if self.micro_batch_size == 0:
            wanted = 8 if size < 1e9 else 1
            self.micro_batch_size = min(wanted, self.global_batch_size or wanted)
        if self.global_batch_size == 0:
            tokens = next(tokens for limit, tokens in BATCH_TOKENS if size < limit)
            micro_batches = max(1, tokens // (model.seq_length * max(1, self.micro_batch_size)))
            self.global_batch_size = micro_batches * self.micro_batch_size
