"""Damage on purpose: real spikes in a small model within a minute, to see the guard at work (experiment=spike/...).

Bad data sits at fixed positions of the stream, as a bad shard does: it comes again when the steps are replayed, and is
gone when the data is skipped. The other kinds strike at a step, `times` times: once is a hardware fault (the replay does
not see it), twice a true one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from megalm.config import Config
from megalm.config.guard import GuardConfig, ProvokeConfig
from megalm.data.batch import Batch
from megalm.parallel.mesh import Mesh
from megalm.train.batch_source import BatchSource, WrappedSource
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

DATA_KINDS = ("random_tokens", "permuted_tokens", "repeated_token")


def make_provoke_hooks(config: GuardConfig) -> list[Hook]:
    """Make the hook that does the damage that `guard.provoke` asks for, if it asks for any."""
    return [] if config.provoke.kind == "none" else [ProvokeHook(config.provoke)]


def provoke_source(config: Config, source: BatchSource, mesh: Mesh) -> BatchSource:
    """The source, with the bad data that `guard.provoke` asks for in it, if it asks for any."""
    if config.guard.provoke.kind not in DATA_KINDS:
        return source
    return DamagedSource(source, config.guard.provoke, config, mesh.data.rank)


def find_damaged_positions(config: ProvokeConfig, batch_size: int) -> range:
    """Find positions of the stream whose batches are bad: those that the configured steps have in an undisturbed run."""
    first = (config.step - 1) * batch_size
    return range(first, first + config.steps * batch_size)


class DamagedSource(WrappedSource):
    """Another source, whose batches are bad where they begin at the damaged positions."""

    def __init__(self, source: BatchSource, damage: ProvokeConfig, config: Config, data_rank: int) -> None:
        super().__init__(source)
        self.kind, self.data_rank, self.vocab_size = damage.kind, data_rank, config.model.vocab_size
        self.positions = find_damaged_positions(damage, config.train.global_batch_size)

    def next(self) -> list[Batch]:
        position = int(self.next_positions()[0])
        batches = super().next()
        if position not in self.positions:
            return batches
        generator = torch.Generator().manual_seed(position * 1009 + self.data_rank)
        return [spoil(batch, self.kind, self.vocab_size, generator) for batch in batches]


class ProvokeHook(Hook):
    """Does what `guard.provoke` says to weights, moments, gradients and the learning rate, and tells of all damage."""

    name = "provoke"

    def __init__(self, config: ProvokeConfig):
        self.config = config
        self.occasions = 0
        """Times that the first step of the damage came."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Strike, if this is the step for it."""
        kind, step = self.config.kind, trainer.step + 1
        if not (self._data_is_bad(trainer) if kind in DATA_KINDS else self._strikes(step)):
            return
        trainer.events.write("provoke", step=step, what=kind)
        if kind == "zero_second_moment":
            for box in trainer.boxes():
                if box.name.startswith("optimizer.exp_avg_sq."):
                    box.tensor.zero_()
        elif kind == "lr_jump":
            trainer.control.jump_rate(self.name, self.config.factor)
        elif kind == "bit_flip":
            trainer.optimizer.wait_weights()
            if trainer.mesh.rank == self.config.rank:
                flip_bit(_target(trainer.model_chunks), self.config.bit)
        elif kind == "gradient_scale":
            trainer.control.scale_gradients(self.config.factor)

    def _data_is_bad(self, trainer: Trainer) -> bool:
        positions = find_damaged_positions(self.config, trainer.config.train.global_batch_size)
        return int(trainer.batch_source.next_positions()[0]) in positions

    def _strikes(self, step: int) -> bool:
        if not self.config.step <= step < self.config.step + self.config.steps:
            return False
        self.occasions += step == self.config.step
        return 0 < self.occasions <= self.config.times


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
