"""How long and in what batches a run trains."""

from dataclasses import dataclass


@dataclass
class TrainConfig:
    """Length, batch sizes and rhythm of a run."""

    steps: int | None = None
    """Updates to make; None: as many as `tokens` asks for."""
    tokens: float | None = None
    """Tokens to train on, in place of steps (1e9 for example); both None: 20 a parameter (Hoffmann et al. 2022)."""
    global_batch_size: int = 32
    """Sequences in one update, over all ranks."""
    micro_batch_size: int = 8
    """Sequences in one forward pass of one data rank."""
    seed: int = 1234
    """Decides the initial weights, the data order and dropout."""
    log_every: int = 10
    """Steps between lines on the console (metrics.jsonl has every step)."""
    eval_every: int = 100
    """Steps between evaluations on held-out documents; 0: only at the end."""
    eval_sequences: int = 64
    """Held-out sequences in one evaluation; 0: none."""
    deterministic: bool = True
    """Only algorithms whose result does not change from run to run."""
    sample: bool = True
    """Let the model write a paragraph at the end."""
    sample_prompt: str = "The "
    """What the paragraph begins with."""
    sample_tokens: int = 160
    """Tokens of the paragraph."""
