"""Damage on purpose: real spikes in a small model within a minute, to see the guard at work (experiment=spike/...).

Bad data sits at fixed positions of the stream, as a bad shard does: it comes again when the steps are replayed, and is
gone when the data is skipped. The other kinds strike at a step, `times` times: once is a hardware fault (the replay does
not see it), twice a true one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from megalm.config.guard import GuardConfig, ProvokeConfig
from megalm.train.hooks import Hook
from megalm.train.signals import Signals

if TYPE_CHECKING:
    from megalm.data.batch import Batch
    from megalm.train.trainer import Trainer

DATA_KINDS = ("random_tokens", "permuted_tokens", "repeated_token")


def provoke_hooks(config: GuardConfig) -> list[Hook]:
    """The hook that does the damage that `guard.provoke` asks for, if it asks for any. It comes right behind the guard."""
    return [] if config.provoke.kind == "none" else [ProvokeHook(config.provoke)]


class ProvokeHook(Hook):
    """Does what `guard.provoke` says. It stands behind the guard, which sets the learning rate that a jump multiplies."""

    def __init__(self, config: ProvokeConfig):
        self.config = config
        self.occasions = 0
        """Times that the first step of the damage came."""
        self._undo_lr: float | None = None
        self._gradient_factor = 1.0

    def on_train_start(self, trainer: Trainer) -> None:
        """Put the damage between the loader, or the gradients, and the step."""
        if self.config.kind in DATA_KINDS:
            loader: Any = trainer.loader
            loader.next = self._spoiled(trainer, loader.next)
        elif self.config.kind == "gradient_scale":
            executor: Any = trainer.executor
            run = executor.run
            executor.run = lambda batches, scale=1.0: run(batches, scale=scale * self._gradient_factor)

    def on_step_start(self, trainer: Trainer) -> None:
        """Strike, if this is the step for it."""
        kind, step = self.config.kind, trainer.step + 1
        self._gradient_factor = 1.0
        if kind in DATA_KINDS or not self._strikes(step):
            return
        trainer.events.write("provoke", step=step, what=kind)
        if kind == "zero_second_moment":
            for box in trainer.boxes():
                if box.name.startswith("optimizer.exp_avg_sq."):
                    box.tensor.zero_()
        elif kind == "lr_jump":
            self._undo_lr = trainer.lr_scale
            trainer.lr_scale *= self.config.factor
        elif kind == "bit_flip":
            trainer.optimizer.wait_weights()
            if trainer.mesh.rank == self.config.rank:
                flip_bit(_target(trainer.model_chunks), self.config.bit)
        elif kind == "gradient_scale":
            self._gradient_factor = self.config.factor

    def on_gradients(self, trainer: Trainer, signals: Signals) -> bool:
        """Take back what lasts one step only; the step has its learning rate."""
        if self._undo_lr is not None:
            trainer.lr_scale, self._undo_lr = self._undo_lr, None
        return True

    def _strikes(self, step: int) -> bool:
        if not self.config.step <= step < self.config.step + self.config.steps:
            return False
        self.occasions += step == self.config.step
        return 0 < self.occasions <= self.config.times

    def _spoiled(self, trainer: Trainer, fetch: Any) -> Any:
        batch_size = trainer.config.train.global_batch_size
        first = (self.config.step - 1) * batch_size
        last = first + self.config.steps * batch_size

        def next_batches() -> list[Batch]:
            position = int(trainer.loader.next_positions()[0])
            batches = fetch()
            if not first <= position < last:
                return batches
            trainer.events.write("provoke", step=trainer.step + 1, what=self.config.kind)
            seed = position * 1009 + trainer.mesh.data.rank
            generator = torch.Generator().manual_seed(seed)
            return [spoil(batch, self.config.kind, trainer.config.model.vocab_size, generator) for batch in batches]

        return next_batches


def spoil(batch: Batch, kind: str, vocab_size: int, generator: torch.Generator) -> Batch:
    """The batch with random tokens, its own tokens in random order, or one token over and over."""
    rows, length = batch.tokens.shape
    whole = torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1)
    if kind == "random_tokens":
        whole = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    elif kind == "permuted_tokens":
        whole = whole[:, torch.randperm(length + 1, generator=generator)]
    else:
        whole = whole[:, :1].expand(rows, length + 1)
    return replace(batch, tokens=whole[:, :-1].contiguous(), labels=whole[:, 1:].contiguous())


def flip_bit(weight: torch.Tensor, bit: int) -> None:
    """Flip one bit of the tensor's middle element; `bit` counts as in fp32, whose upper half bf16 is."""
    flat = weight.detach().view(-1)
    index = flat.numel() // 2
    if weight.element_size() == 2:
        view, bit = flat.view(torch.int16), max(0, bit - 16)
    else:
        view = flat.view(torch.int32)
    mask = 1 << bit
    limit = 8 * weight.element_size()
    view[index] ^= mask - (1 << limit) if bit == limit - 1 else mask


def _target(chunks: Any) -> torch.Tensor:
    """A large matrix in the middle of the network."""
    matrices = [p for chunk in chunks for name, p in chunk.named_parameters() if p.dim() == 2 and "layers" in name]
    return matrices[len(matrices) // 2]
