"""What a run saves with and resumes from."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from megalm.checkpoint.address import read_url
from megalm.checkpoint.boxes import BoxIndex, bytes_of, describe_memory, index_of
from megalm.checkpoint.commit import name_step
from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError, NoSpaceError
from megalm.checkpoint.load import (
    OPTIMIZER_PREFIX,
    check_same_model,
    fill_boxes,
    list_shapes,
    read_ranks,
    read_state,
)
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.place import Place
from megalm.checkpoint.planner import BoxSavePlanner
from megalm.checkpoint.ranks import Ranks, agree_on, catch_problem, find_ranks, run_on_rank_0
from megalm.checkpoint.remote import RemoteStore
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.save import SaveRequest, encode_json, write_and_commit, write_aside
from megalm.checkpoint.source import CheckpointSource
from megalm.checkpoint.staging import Staging
from megalm.checkpoint.store import LocalStore, Store, find_named_checkpoint, find_store, open_store
from megalm.checkpoint.upload import Uploader, find_waiting_room, take_up
from megalm.checkpoint.verify import verify
from megalm.config import CheckpointConfig, ConfigError
from megalm.parallel.slices import Box

# How long a run that goes back waits for an object store to delete what it went back on, before it trains on meanwhile.
_DELETION_PATIENCE_S = 10.0
_AXES = ("data", "tensor", "pipeline", "context", "expert")


class Events(Protocol):
    """Where a checkpointer tells what happened (the trainer's event log)."""

    def __call__(self, kind: str, *, step: int, **fields: Any) -> None: ...


class Checkpointer:
    """Saves boxes to `folder/step-00000100/` and loads them on any layout.

    Every method but `latest`, `newest_verified` and `poll` is collective: each rank calls it at the same point.

    Args:
        folder: where the checkpoints are: a folder (on several nodes, one that all of them see), or a fsspec URL.
        config: how many to keep, and how to upload.
        mesh: `megalm.parallel.mesh.Mesh` (its `world_size` and the sizes of its axes are used).
        events: told, on rank 0 and from the calling thread, of `checkpoint` (it is durable), `checkpoint_failed`,
            `checkpoint_rejected` (found damaged at a load), and with a URL of `checkpoint_delayed` and
            `checkpoint_dropped`.
        ranks, upload_ranks: how to talk to the other ranks; default: a gloo group of its own for each.
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
        upload_ranks: Ranks | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self.config = config
        self.layout = {axis: int(getattr(mesh, axis).size) for axis in _AXES}
        self.ranks = ranks if ranks is not None else find_ranks(mesh.world_size, timeout_s)
        self.store: Store = open_store(folder)
        self.place = Place(self.store, self.ranks)
        self.retention = Retention(self.store, config)
        self.folder = Path(folder)
        """Where files are written: the folder itself, or with a URL the local one that they are uploaded from."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"checkpoint.path={folder} is a file: give a folder, or a URL such as s3://bucket/run.")
        self._uploader: Uploader | None = None
        if isinstance(self.store, RemoteStore):
            self.folder = find_waiting_room(config, self.store.where)
            self._take_up(self.store)
            talk = upload_ranks if upload_ranks is not None else find_ranks(mesh.world_size, timeout_s)
            self._uploader = Uploader(self.store, talk, config.upload_queue, self.retention.apply)
        self._events = events
        self._staging = Staging()
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[Manifest] | None = None
        self._started = 0.0
        self._step = 0
        self._swept = False
        self._planned: tuple[BoxIndex, ...] | None = None
        self._plan: list[WriteItem] = []
        self._arranged: tuple[Any, ...] | None = None
        self._failure: CheckpointError | None = None  # of the last save
        self.durable: int | None = None
        """Step of the newest checkpoint that this process loaded or saved, and that is durable."""
        self.stall_s = 0.0
        """Seconds that the last `save` kept its caller."""

    def prepare(self, boxes: Sequence[Box]) -> None:
        """Clear what crashes left, and see that these boxes can be saved. Errors: CheckpointError if they cannot."""
        parts = self.ranks.all_gather({box.name: bytes_of(box) for box in boxes})
        self.place.prepare(sum({name: size for part in parts for name, size in part.items()}.values()), self.retention)
        if self._uploader is not None:
            agree_on(self.ranks, catch_problem(LocalStore(self.folder).try_writing))

    def trust(self, step: int) -> None:
        """What was saved up to this step has proved good, and counts for retention; what comes later deletes nothing yet.

        Without a call, everything counts as soon as it is durable. Costs nothing and never waits.
        """
        self.retention.trusted = step
        idle = self._running is None and self._uploader is None and self.ranks.rank == 0
        if self._thread is not None and idle and self.retention.due:
            self._thread.submit(self.retention.apply)

    def save(
        self,
        step: int,
        boxes: Sequence[Box],
        state: dict[str, Any],
        rank_state: dict[str, Any],
        wait: bool = False,
        *,
        only_finite: bool = False,
    ) -> None:
        """Save under `step`; returns once everything is copied to host memory, or with `wait` once it is durable.

        `state` must be the same on every rank (rank 0's is kept); `rank_state` is this rank's own. Both as JSON.
        The boxes of all ranks must cover their tensors; with `only_finite`, none may hold a NaN or an infinity.
        A save that is still being written is waited for first.
        Errors: CheckpointError with `wait`; without it, a failure becomes the event `checkpoint_failed`.
        """
        begun = time.monotonic()
        self._finish()
        self._failure = None
        request = self._stage(step, boxes, state, rank_state, only_finite)
        self._started, self._step = begun, step
        self.retention.newest = step
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running = self._thread.submit(self._write, request)
        self.stall_s = time.monotonic() - begun
        if wait:
            self.wait()
            self.stall_s = time.monotonic() - begun
        elif not self.config.asynchronous:
            self._finish()
            self.stall_s = time.monotonic() - begun

    def wait(self) -> None:
        """Until the last save is durable. Errors: CheckpointError on every rank if it failed, however long ago."""
        problem = self.settle()
        if problem is not None:
            raise problem
        if (uploader := self._uploader) is not None:
            problem = catch_problem(lambda: uploader.drain(self.config.upload_timeout_s))
            self._report_uploads()
            agree_on(self.ranks, problem)

    def settle(self) -> CheckpointError | None:
        """Wait until the save under way is written; why it, or the last one, failed: None where it did not."""
        self._finish()
        return self._failure

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank. A save under way is written first: its thread talks over the same group."""
        self._finish()
        return self.ranks.broadcast(value)

    def poll(self) -> None:
        """Report a save that ended meanwhile, as an event; call it once a step. Costs nothing and never waits."""
        if self._running is not None and self._running.done():
            self._finish()
        self._report_uploads()

    def close(self) -> None:
        """Wait for the save under way, and give memory and threads back."""
        try:
            self._finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            if self._uploader is not None:
                self._uploader.close()
                self._report_uploads()
            if self.retention.due and self.ranks.rank == 0:
                self.retention.apply()
            self._staging.close()
            self._arranged = None

    def latest(self) -> Path | str | None:
        """The newest checkpoint with a good manifest and all files in full length; None if nothing was saved yet.

        Errors: CorruptCheckpointError if there are checkpoints and none of them is good: a run must not start again from
        its first step because its checkpoints are damaged. CheckpointError if the store cannot be reached.
        """
        reasons = []
        for name in self.store.names():
            source = self.store.source(name)
            try:
                source.manifest()
                return self._path(source)
            except CorruptCheckpointError as error:
                reasons.append(str(error))
        if reasons:
            raise CorruptCheckpointError(
                f"{self.store.where}: none of its {len(reasons)} checkpoints is whole ({reasons[0]}). Restore one from a "
                "copy, or choose another run.name or checkpoint.path to start from the first step."
            )
        return None

    def newest_verified(self) -> Path | str | None:
        """The newest checkpoint every byte of which matches its checksum; reads all of it."""
        for name in self.store.names():
            source = self.store.source(name)
            try:
                verify(source)
                return self._path(source)
            except CorruptCheckpointError as error:
                self._event("checkpoint_rejected", step=self.store.step(name), path=source.name, reason=str(error))
        return None

    def load(
        self,
        boxes: Sequence[Box],
        *,
        path: Path | str | None = None,
        weights_only: bool = False,
        optional: Callable[[str], bool] = lambda name: False,
        check: Callable[[dict[str, Any], str], None] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Fill the boxes' tensors in place from `path`, or from the newest good checkpoint of the folder.

        A folder of checkpoints, or of a run, as `path` means the newest good one in it. Where a checkpoint turns out to be
        damaged, this is reported (`checkpoint_rejected`) and the one before it is taken; if `path` names one, there is no other.
        With `weights_only`, boxes of optimizer tensors stay as they are; so do `optional` ones that it has not. `check` gets a
        checkpoint's state and name on every rank before any of it is taken; what it raises (alike on all) ends the load.

        Returns: (state, this rank's own state; None on another layout than it was saved on, and with `weights_only`).
        Errors: ConfigError if it is a checkpoint of another model (nothing is overwritten), or there is none;
            CorruptCheckpointError if every one that could be taken is damaged.
        """
        self._finish()
        if weights_only:
            boxes = [box for box in boxes if not box.name.startswith(OPTIMIZER_PREFIX)]
        wanted = {name: shape for part in self.ranks.all_gather(list_shapes(boxes)) for name, shape in part.items()}
        tried: list[str] = []
        damage = None
        while True:
            # Listed again after each failure: a run that is still saving may have deleted what was just being read.
            names = run_on_rank_0(self.ranks, lambda: self._candidates(path))
            name = next((name for name in names if name not in tried), None)
            if name is None:
                raise damage or ConfigError(
                    f"{path or self.store.where}: there is no checkpoint (a folder such as step-00000100)."
                )
            source = self._source(path, name)
            try:
                state, own = self._load_one(source, boxes, wanted, optional, check)
                if path is None:
                    self.durable = self._step_of(name)
                return state, None if weights_only else own
            except CorruptCheckpointError as error:
                damage = error
                tried.append(name)
                self._event("checkpoint_rejected", step=self._step_of(name), path=source.name, reason=str(error))

    def discard_after(self, step: int) -> list[str]:
        """Delete checkpoints of later steps: a run that went back to `step` must not resume from what it left.

        One good checkpoint is always kept, even if it is a later one. Returns the names of the deleted.
        With a URL, what waits of later steps is given up, too; a store that is away is waited for in the background.
        """
        self._finish()
        deleted: list[str] = []

        def discard() -> list[str]:
            good = []
            for name in self.store.names():
                with suppress(CorruptCheckpointError):
                    self.store.source(name).manifest()
                    good.append(name)
            doomed = [name for name in good if self.store.step(name) > step]
            doomed = doomed[:-1] if len(doomed) == len(good) else doomed
            for name in doomed:
                self.store.remove(name)
            deleted.extend(doomed)
            return deleted

        def discard_in_store() -> list[str]:
            assert self._uploader is not None
            self._uploader.go_back(step, discard)
            self._uploader.settle(_DELETION_PATIENCE_S)
            return deleted

        return run_on_rank_0(self.ranks, discard if self._uploader is None else discard_in_store)

    def _stage(
        self, step: int, boxes: Sequence[Box], state: dict[str, Any], rank_state: dict[str, Any], only_finite: bool
    ) -> SaveRequest:
        memory = tuple(describe_memory(box) for box in boxes)
        if memory != self._arranged:
            self._arranged = None  # whatever fails below is done again at the next save
            planner = BoxSavePlanner(boxes)
            key = tuple(index_of(box) for box in planner.boxes)
            if key != self._planned:
                self._plan, self._planned = self._agree(planner), key
            self._staging.arrange([(item, planner.resolve_data(item)) for item in self._plan])
            self._arranged = memory
        return SaveRequest(
            step=step,
            folder=self.folder,
            state=encode_json(state, "the run's state"),
            rank_state=json.loads(encode_json(rank_state, "a rank's own state")),
            layout=self.layout,
            chunks=self._staging.take(),
            only_finite=only_finite,
        )

    def _agree(self, planner: BoxSavePlanner) -> list[WriteItem]:
        """Which pieces this rank writes. Collective, and needed only when the boxes changed: at the first save."""
        plans = self.ranks.gather(planner.create_local_plan())
        made: list[SavePlan] = run_on_rank_0(self.ranks, lambda: planner.create_global_plan(plans or [])[0])
        return made[self.ranks.rank].items

    def _write(self, request: SaveRequest) -> Manifest:
        """The background thread's work."""
        if self._uploader is not None:
            saved = write_aside(request, self.ranks)
            self._uploader.add(saved)
            for name in self.ranks.broadcast(self._uploader.thin() if self.ranks.rank == 0 else None):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            return saved.manifest
        if self.ranks.rank == 0 and not self._swept:
            self.store.clear()
        self._swept = True
        try:
            manifest = write_and_commit(request, self.ranks)
        except NoSpaceError:
            if not self.ranks.broadcast(self.retention.make_room() if self.ranks.rank == 0 else None):
                raise
            manifest = write_and_commit(request, self.ranks)
        if self.ranks.rank == 0:
            self.retention.apply()
        return manifest

    def _take_up(self, store: RemoteStore) -> None:
        """Bring to the store what an earlier process left waiting on this node."""

        def upload() -> None:
            take_up(store, self.folder)

        run_on_rank_0(self.ranks, upload)

    def _finish(self) -> None:
        """Wait for the save under way and report it; `_failure` keeps what it failed with."""
        running, self._running = self._running, None
        if running is not None:
            try:
                manifest = running.result()
            except Exception as error:
                self._failure = error if isinstance(error, CheckpointError) else CheckpointError(str(error))
                self._event("checkpoint_failed", step=self._step, reason=str(error))
                return
            if self._uploader is None:
                self.durable = manifest.step
                self._event(
                    "checkpoint",
                    step=manifest.step,
                    path=str(self.folder / name_step(manifest.step)),
                    bytes=manifest.bytes,
                    seconds=round(time.monotonic() - self._started, 3),
                    stall_s=round(self.stall_s, 4),
                )
        self._report_uploads()

    def _report_uploads(self) -> None:
        for event in self._uploader.events() if self._uploader is not None else []:
            if event.kind == "checkpoint":
                self.durable = event.step
            self._event(event.kind, step=event.step, **event.fields)

    def _load_one(
        self,
        source: CheckpointSource,
        boxes: Sequence[Box],
        wanted: dict[str, tuple[int, ...]],
        optional: Callable[[str], bool],
        check: Callable[[dict[str, Any], str], None] | None,
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Load one checkpoint on all ranks; what one rank finds wrong is raised on all of them."""

        def read() -> tuple[Manifest, dict[str, Any], dict[str, Any]]:
            manifest = source.manifest()
            return manifest, read_state(source, manifest), read_ranks(source, manifest)

        manifest, state, saved = run_on_rank_0(self.ranks, read)
        if check is not None:
            check(state, source.name)
        wanted = {n: shape for n, shape in wanted.items() if n in manifest.tensors or not optional(n)}
        check_same_model(wanted, manifest, source.name)
        problem = None
        try:
            fill_boxes([box for box in boxes if box.name in wanted], source, manifest)
        except CheckpointError as error:
            problem = error
        agree_on(self.ranks, problem)
        same = saved.get("world_size") == self.ranks.size and saved.get("layout") == self.layout
        return state, saved["ranks"][self.ranks.rank] if same else None

    def _candidates(self, path: Path | str | None) -> list[str]:
        """Names in the store at `path`; a single empty one where `path` itself is the checkpoint."""
        if path is None:
            return self.store.names()
        return [""] if find_named_checkpoint(path) is not None else find_store(path).names()

    def _source(self, path: Path | str | None, name: str) -> CheckpointSource:
        if path is None:
            return self.store.source(name)
        if name:
            return find_store(path).source(name)
        source = find_named_checkpoint(path)
        if source is None:
            raise CheckpointError(f"{path}: rank {self.ranks.rank} does not see the checkpoint that rank 0 sees")
        return source

    def _step_of(self, name: str) -> int:
        with suppress(CheckpointError):
            return self.store.step(name)
        return -1

    def _path(self, source: CheckpointSource) -> Path | str:
        return source.name if read_url(source.name) else Path(source.name)

    def _event(self, kind: str, *, step: int, **fields: Any) -> None:
        if self._events is not None and self.ranks.rank == 0:
            self._events(kind, step=step, **fields)
