"""What a run saves with and resumes from."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from megalm.checkpoint.boxes import BoxIndex, index_of
from megalm.checkpoint.commit import committed, read_manifest, remove, retain, step_name, step_of, sweep
from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError
from megalm.checkpoint.load import (
    OPTIMIZER_PREFIX,
    check_same_model,
    fill,
    names_and_shapes,
    read_ranks,
    read_state,
)
from megalm.checkpoint.manifest import MANIFEST, Manifest
from megalm.checkpoint.planner import BoxSavePlanner
from megalm.checkpoint.ranks import Ranks, ranks_of
from megalm.checkpoint.save import SaveRequest, json_bytes, write_and_commit
from megalm.checkpoint.source import LocalSource
from megalm.checkpoint.staging import Staging
from megalm.checkpoint.verify import verify
from megalm.config import CheckpointConfig, ConfigError
from megalm.parallel.slices import Box

_AXES = ("data", "tensor", "pipeline", "context", "expert")


class Events(Protocol):
    """Where a checkpointer tells what happened (the trainer's event log)."""

    def __call__(self, kind: str, *, step: int, **fields: Any) -> None: ...


class Checkpointer:
    """Saves boxes to `folder/step-00000100/` and loads them on any layout.

    Every method but `latest`, `newest_verified` and `poll` is collective: each rank calls it at the same point.

    Args:
        folder: where the checkpoints are; on several nodes, storage that all of them see.
        config: how many to keep.
        mesh: `megalm.parallel.mesh.Mesh` (its `world_size` and the sizes of its axes are used).
        events: told of `checkpoint`, `checkpoint_failed` and `checkpoint_rejected`, always from the calling thread.
        timeout_s: how long ranks wait for each other's small messages before a save counts as failed.
    """

    def __init__(
        self,
        folder: Path | str,
        config: CheckpointConfig,
        mesh: Any,
        *,
        events: Events | None = None,
        ranks: Ranks | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self.folder = Path(folder)
        self.config = config
        self.layout = {axis: int(getattr(mesh, axis).size) for axis in _AXES}
        self.ranks = ranks if ranks is not None else ranks_of(mesh.world_size, timeout_s)
        self._events = events
        self._staging = Staging()
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[Manifest] | None = None
        self._started = 0.0
        self._swept = False
        self._planned: tuple[BoxIndex, ...] | None = None
        self._plan: list[WriteItem] = []
        self._step = 0
        self.stall_s = 0.0
        """Seconds that the last `save` kept its caller."""

    def save(
        self, step: int, boxes: Sequence[Box], state: dict[str, Any], rank_state: dict[str, Any], wait: bool = False
    ) -> None:
        """Save under `step`; returns once everything is copied to host memory, or with `wait` once it is durable.

        `state` must be the same on every rank (rank 0's is kept); `rank_state` is this rank's own. Both as JSON.
        The boxes of all ranks must cover their tensors. A save that is still being written is waited for first.
        Errors: CheckpointError with `wait`; without it, a failure becomes the event `checkpoint_failed`.
        """
        begun = time.monotonic()
        self._finish(quietly=True)
        request = self._stage(step, boxes, state, rank_state)
        self._started, self._step = begun, step
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running = self._thread.submit(self._write, request)
        self.stall_s = time.monotonic() - begun
        if wait or not self.config.asynchronous:
            self._finish(quietly=not wait)
            self.stall_s = time.monotonic() - begun

    def wait(self) -> None:
        """Until the save under way is durable. Errors: CheckpointError if it failed (after the event)."""
        self._finish(quietly=False)

    def poll(self) -> None:
        """Report a save that ended meanwhile, as an event; call it once a step. Costs nothing and never waits."""
        if self._running is not None and self._running.done():
            self._finish(quietly=True)

    def close(self) -> None:
        """Wait for the save under way, and give memory and threads back."""
        try:
            self._finish(quietly=True)
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            self._staging.close()

    def latest(self) -> Path | None:
        """The newest folder with a good manifest and all files in full length; None if nothing was saved yet.

        Errors: CorruptCheckpointError if there are checkpoints and none of them is good: a run must not start again from
        its first step because its checkpoints are damaged.
        """
        reasons = []
        for path in committed(self.folder):
            try:
                read_manifest(path)
                return path
            except CorruptCheckpointError as error:
                reasons.append(str(error))
        if reasons:
            raise CorruptCheckpointError(
                f"{self.folder}: none of its {len(reasons)} checkpoints is whole ({reasons[0]}). Restore one from a copy, "
                "or choose another run.name or checkpoint.path to start from the first step."
            )
        return None

    def newest_verified(self) -> Path | None:
        """The newest checkpoint every byte of which matches its checksum; reads all of it."""
        for path in committed(self.folder):
            try:
                verify(LocalSource(path))
                return path
            except CorruptCheckpointError as error:
                self._event("checkpoint_rejected", step=step_of(path), path=str(path), reason=str(error))
        return None

    def load(
        self, boxes: Sequence[Box], *, path: Path | str | None = None, weights_only: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Fill the boxes' tensors in place from `path`, or from the newest good checkpoint of the folder.

        A folder of checkpoints as `path` means the newest good one in it. Where a checkpoint turns out to be damaged,
        this is reported (`checkpoint_rejected`) and the one before it is taken; if `path` names one, there is no other.
        With `weights_only`, boxes of optimizer tensors stay as they are.

        Returns: (state, this rank's own state; None on another layout than it was saved on, and with `weights_only`).
        Errors: ConfigError if it is a checkpoint of another model (nothing is overwritten), or there is none;
            CorruptCheckpointError if every one that could be taken is damaged.
        """
        self._finish(quietly=True)
        if weights_only:
            boxes = [box for box in boxes if not box.name.startswith(OPTIMIZER_PREFIX)]
        candidates = self.ranks.broadcast(self._candidates(path) if self.ranks.rank == 0 else None)
        if not candidates:
            raise ConfigError(f"{path or self.folder}: there is no checkpoint (a folder such as step-00000100).")
        wanted: dict[str, tuple[int, ...]] = {}
        for part in self.ranks.all_gather(names_and_shapes(boxes)):
            wanted.update(part)
        reason = ""
        for candidate in candidates:
            result = self._try(candidate, boxes, wanted)
            if not isinstance(result, str):
                state, own = result
                return state, None if weights_only else own
            reason = result
            self._event("checkpoint_rejected", step=_step(candidate), path=str(candidate), reason=reason)
        raise CorruptCheckpointError(reason)

    def discard_after(self, step: int) -> list[Path]:
        """Delete checkpoints of later steps: a run that went back to `step` must not resume from what it left.

        One good checkpoint is always kept, even if it is a later one. Returns what was deleted (on rank 0).
        """
        self._finish(quietly=True)
        removed: list[Path] = []
        if self.ranks.rank == 0:
            good = [path for path, _ in self._good()]
            doomed = [path for path in good if step_of(path) > step]
            for path in doomed[:-1] if len(doomed) == len(good) else doomed:
                remove(path)
                removed.append(path)
        self.ranks.broadcast(None)
        return removed

    def _stage(self, step: int, boxes: Sequence[Box], state: dict[str, Any], rank_state: dict[str, Any]) -> SaveRequest:
        planner = BoxSavePlanner(boxes)
        key = tuple(index_of(box) for box in planner.boxes)
        if key != self._planned:
            self._plan, self._planned = self._agree(planner), key
        return SaveRequest(
            step=step,
            folder=self.folder,
            state=json_bytes(state, "the run's state"),
            rank_state=json.loads(json_bytes(rank_state, "a rank's own state")),
            layout=self.layout,
            chunks=self._staging.take([(item, planner.resolve_data(item)) for item in self._plan]),
        )

    def _agree(self, planner: BoxSavePlanner) -> list[WriteItem]:
        """Which pieces this rank writes. Collective, and needed only when the boxes changed: at the first save."""
        plans = self.ranks.gather(planner.create_local_plan())
        made: list[SavePlan] | str | None = None
        if plans is not None:
            try:
                made, _ = planner.create_global_plan(plans)
            except CheckpointError as error:
                made = str(error)
        made = self.ranks.broadcast(made)
        if isinstance(made, str):
            raise CheckpointError(made)
        assert made is not None
        return made[self.ranks.rank].items

    def _write(self, request: SaveRequest) -> Manifest:
        """The background thread's work."""
        if self.ranks.rank == 0 and not self._swept and self.folder.is_dir():
            sweep(self.folder)
        self._swept = True
        manifest = write_and_commit(request, self.ranks)
        if self.ranks.rank == 0:
            # The checkpoint is durable already; old ones that cannot be deleted are no reason to call it failed.
            with suppress(OSError):
                retain(self.folder, self.config.keep, self.config.keep_every)
        return manifest

    def _finish(self, *, quietly: bool) -> None:
        """Wait for the save under way and report it."""
        running, self._running = self._running, None
        if running is None:
            return
        try:
            manifest = running.result()
        except Exception as error:
            self._event("checkpoint_failed", step=self._step, reason=str(error))
            if not quietly:
                raise
            return
        self._event(
            "checkpoint",
            step=manifest.step,
            path=str(self.folder / step_name(manifest.step)),
            bytes=manifest.bytes,
            seconds=round(time.monotonic() - self._started, 3),
            stall_s=round(self.stall_s, 4),
        )

    def _try(
        self, path: Path, boxes: Sequence[Box], wanted: dict[str, tuple[int, ...]]
    ) -> tuple[dict[str, Any], dict[str, Any] | None] | str:
        """Load one checkpoint on all ranks: the states, or on all of them the reason why not."""
        source = LocalSource(path)
        opened: tuple[Manifest, dict[str, Any], dict[str, Any]] | str | None = None
        if self.ranks.rank == 0:
            try:
                manifest = source.manifest()
                opened = (manifest, read_state(source, manifest), read_ranks(source, manifest))
            except CorruptCheckpointError as error:
                opened = str(error)
        opened = self.ranks.broadcast(opened)
        if isinstance(opened, str):
            return opened
        assert opened is not None
        manifest, state, saved = opened
        check_same_model(wanted, manifest, str(path))
        problem = None
        try:
            fill(boxes, source, manifest)
        except CorruptCheckpointError as error:
            problem = str(error)
        found = [text for text in self.ranks.all_gather(problem) if text is not None]
        if found:
            return str(found[0])
        same = saved.get("world_size") == self.ranks.size and saved.get("layout") == self.layout
        return state, saved["ranks"][self.ranks.rank] if same else None

    def _candidates(self, path: Path | str | None) -> list[Path]:
        if path is None:
            return committed(self.folder)
        given = Path(path)
        return [given] if (given / MANIFEST).exists() else committed(given)

    def _good(self) -> list[tuple[Path, Manifest]]:
        found = []
        for path in committed(self.folder):
            with suppress(CorruptCheckpointError):
                found.append((path, read_manifest(path)))
        return found

    def _event(self, kind: str, *, step: int, **fields: Any) -> None:
        if self._events is not None and self.ranks.rank == 0:
            self._events(kind, step=step, **fields)


def _step(path: Path) -> int:
    """The step in the folder's name; -1 for a folder that was given another name."""
    with suppress(CheckpointError):
        return step_of(path)
    return -1
