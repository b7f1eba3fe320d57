"""The reference of preferences: log-probabilities of every answer under the weights that the run began with.

They are computed once, by the run's own engine on its own layout, before the first step, and kept beside the data in
PREFIX.reference-DIGEST.npz, where DIGEST is that of the weights. A run that goes on takes them from there.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megalm.checkpoint.digest import digest_tensors
from megalm.checkpoint.ranks import run_on_rank_0
from megalm.config import Config, ConfigError
from megalm.data.loader import Loader
from megalm.data.pairs import PairedSource
from megalm.objectives.preference import AnswerScores
from megalm.parallel.collectives import all_reduce
from megalm.parallel.context import shard_batch
from megalm.train.build import find_local_seq_length
from megalm.train.hooks import Hook

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

FORMAT = 1


class ReferenceHook(Hook):
    """Gives the pairs of a loader what the reference thinks of them, before the first batch. On every rank.

    Errors: ConfigError where a run goes on whose reference is gone, or of other data.
    """

    name = "reference"

    def __init__(self, config: Config, loader: Loader) -> None:
        self.config, self.loader = config, loader
        self.weights: str | None = None  # digest of the reference's weights

    def state_dict(self) -> dict[str, Any]:
        return {} if self.weights is None else {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state.get("weights", self.weights)

    def on_train_start(self, trainer: Trainer) -> None:
        """Read, or compute, what the reference gives; written down as an event."""
        ranks = trainer.checkpoints.ranks
        begins = self.weights is None
        if begins and trainer.step:
            raise ConfigError(
                f"the checkpoint of step {trainer.step} knows no reference: it was not trained on preferences. Begin a new "
                "run from its weights with checkpoint.load=weights and another run.name."
            )
        if self.weights is None:
            self.weights = digest_tensors([b for b in trainer.boxes() if not b.name.startswith("optimizer.")], ranks)
        for source in self._list_sources():
            place = Path(f"{source.file.prefix}.reference-{self.weights}.npz")
            wanted = describe_data(source, self.config)
            known = ranks.broadcast(_read(place, wanted) if ranks.rank == 0 else None)
            computed = known is None
            if known is None and not begins:
                raise ConfigError(
                    f"{place} is not there, or is of other data: the reference of this run, whose weights were digest "
                    f"{self.weights}. Put it back; or begin a new run from checkpoint.load_path with another run.name."
                )
            if known is None:
                known = self._compute(trainer, source)
                run_on_rank_0(ranks, partial(_write, place, wanted, known))
            for part in self._parts(source):
                part.reference = known
            trainer.events.write(
                "reference", step=trainer.step, path=str(place), computed=computed, answers=len(known), weights=self.weights,
                text=f"reference: {len(known):,} answers {'scored' if computed else 'known'}, {place}",
            )  # fmt: skip

    def _list_sources(self) -> Iterator[PairedSource]:
        """One source for each file."""
        seen = set()
        for source in [*self.loader.sources, *self.loader.held_out]:
            if isinstance(source, PairedSource) and str(source.file.prefix) not in seen:
                seen.add(str(source.file.prefix))
                yield source

    def _parts(self, source: PairedSource) -> list[PairedSource]:
        """Training and held-out samples of the same file."""
        every = [s for s in [*self.loader.sources, *self.loader.held_out] if isinstance(s, PairedSource)]
        return [part for part in every if str(part.file.prefix) == str(source.file.prefix)]

    def _compute(self, trainer: Trainer, source: PairedSource) -> np.ndarray:
        """Log-probability of each document of the source's file that any sample has.

        Shapes: -> fp64 [documents]
        Comm:   the forward passes', then one all-reduce of a number for each document over the world
        """
        mesh, executor = trainer.mesh, trainer.executor
        totals = torch.zeros(source.file.num_documents, dtype=torch.float64, device=mesh.device)
        before = executor.shape
        executor.set_seq_length(find_local_seq_length(self.config, mesh))
        for chunk in executor.chunks:
            chunk.eval()
        try:
            for part in self._parts(source):
                for numbers, batch in self.loader.read_all(part):
                    local = shard_batch(batch.to(mesh.device), mesh.context)
                    (report,) = executor.evaluate([local], AnswerScores())
                    if "answers" not in report:  # another pipeline stage has them
                        continue
                    for row, number in enumerate(numbers):
                        documents = torch.from_numpy(part.documents_of(number)).to(mesh.device)
                        totals[documents] += report["answers"][row, : len(documents)]
        finally:
            executor.shape = before
            for chunk in executor.chunks:
                chunk.train()
        return all_reduce(totals / mesh.tensor.size, mesh.world).cpu().numpy()


def make_preparing_hooks(config: Config, loader: Loader) -> list[Hook]:
    """What a run's objective needs of its data before the first batch."""
    objective = config.objective
    scored = objective.name == "preference" and objective.preference.needs_reference
    return [ReferenceHook(config, loader)] if scored else []


def describe_data(source: PairedSource, config: Config) -> dict[str, Any]:
    """What the scores are of: the tokens, what was rendered with which template and tokenizer, and how they were packed."""
    note: dict[str, Any] = {}
    try:
        note = json.loads(Path(f"{source.file.prefix}.recipe.json").read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        note = {}  # prepared elsewhere: the tokens' fingerprint tells them apart
    return {
        "format": FORMAT,
        "tokens": source.fingerprint,
        "documents": source.file.num_documents,
        "tokenizer": note.get("tokenizer"),
        "template": note.get("template"),
        "dtype": config.precision.dtype,
    }


def _read(place: Path, wanted: dict[str, Any]) -> np.ndarray | None:
    """Read what an earlier run scored of the same; None where there is nothing that fits."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if json.loads(str(stored["of"])) != wanted:
                return None
            scores: np.ndarray = stored["scores"].astype(np.float64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return scores if scores.shape == (wanted["documents"],) and np.isfinite(scores).all() else None


def _write(place: Path, of: dict[str, Any], scores: np.ndarray) -> None:
    temporary = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, of=np.array(json.dumps(of)), scores=scores)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except OSError as error:
        raise ConfigError(
            f"{place}: the reference's scores cannot be kept beside the data ({error.strerror}): make the folder writable."
        ) from None
