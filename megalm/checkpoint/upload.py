"""Taking written checkpoints to the store in the background, in order, for as long as it takes."""

import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.commit import list_left_over, read_manifest
from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError
from megalm.checkpoint.manifest import MANIFEST, compute_checksum
from megalm.checkpoint.ranks import Ranks
from megalm.checkpoint.remote import RemoteStore, name_attempt
from megalm.checkpoint.save import Saved
from megalm.config import CheckpointConfig

# Pause between two rounds of trying while the store is away: short beside a checkpoint's interval.
ROUND_PAUSE_S = 2.0


@dataclass(frozen=True)
class UploadEvent:
    """What the uploader has to tell; read from the training thread."""

    kind: str
    step: int
    fields: dict[str, object]


class Uploader:
    """One thread a rank. Each rank uploads its own files; when all have, rank 0 uploads the manifest.

    While the store is away, rounds of tries go on and new checkpoints wait in a queue. Is it longer than `limit`, the
    oldest is given up (`checkpoint_dropped`), on all ranks alike, because a newer one is worth more: see `thin`.

    Comm: three small messages a round, over `ranks`, which nothing else uses.
    """

    def __init__(self, store: RemoteStore, ranks: Ranks, limit: int, after: Callable[[], None]) -> None:
        self.store, self.ranks, self.limit, self.after = store, ranks, max(1, limit), after
        self._queue: deque[tuple[Saved, float]] = deque()
        self._changed = threading.Condition()
        self._events: list[UploadEvent] = []
        self._stopping = False
        self._broken: str | None = None
        self._delayed: Path | None = None  # told once of each checkpoint, however often it is tried
        self._abandoned: set[Path] = set()
        self._deletions: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def add(self, saved: Saved) -> None:
        """Hand over a written checkpoint; every rank adds the same ones in the same order. Returns at once."""
        with self._changed:
            self._queue.append((saved, time.monotonic()))
            self._changed.notify_all()

    def events(self) -> list[UploadEvent]:
        """What happened since the last call."""
        with self._changed:
            found, self._events = self._events, []
            return found

    def go_back(self, step: int, delete: Callable[[], object]) -> None:
        """The run went back to `step`: what waits of later steps is given up, and then `delete` removes what arrived.

        On rank 0, whose word counts for all. `delete` is tried until the store can be reached.
        """
        with self._changed:
            self._give_up([s for s in self._waiting() if s.manifest.step > step], "the run went back on it")
            self._deletions.append(delete)
            self._changed.notify_all()

    def thin(self) -> list[str]:
        """Give up the oldest checkpoints where more than the limit wait; a try of one may be long under way meanwhile.

        On rank 0, whose word counts for all. Returns the folders that each rank can delete at once.
        """
        with self._changed:
            waiting = self._waiting()
            doomed = waiting[: max(0, len(waiting) - self.limit)]
            self._give_up(doomed, f"more than {self.limit} wait for the store")
            return [saved.aside.name for saved in doomed if saved is not self._queue[0][0]]

    def _waiting(self) -> list[Saved]:
        return [saved for saved, _ in self._queue if saved.aside not in self._abandoned]

    def _give_up(self, doomed: list[Saved], reason: str) -> None:
        for saved in doomed:
            self._abandoned.add(saved.aside)
            self._tell("checkpoint_dropped", saved.manifest.step, reason=reason)

    def settle(self, timeout_s: float) -> None:
        """Until `go_back` is done with, or the time is over."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._deletions and self._broken is None and time.monotonic() < deadline:
                self._changed.wait(0.2)

    def drain(self, timeout_s: float) -> None:
        """Until everything is in the store. Errors: CheckpointError if it is not within the time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (self._queue or self._deletions) and self._broken is None and time.monotonic() < deadline:
                self._changed.wait(0.2)
            if self._broken is not None:
                raise CheckpointError(self._broken)
            if self._queue:
                steps = ", ".join(str(saved.manifest.step) for saved, _ in self._queue)
                raise CheckpointError(
                    f"{self.store.where}: the store could not be reached for {timeout_s:.0f} s; not uploaded: step {steps}, "
                    f"which are in {self._queue[0][0].aside.parent}"
                )
            if self._deletions:
                raise CheckpointError(
                    f"{self.store.where}: the store could not be reached for {timeout_s:.0f} s: checkpoints of steps that the "
                    "run went back on are still there; delete them before it is resumed"
                )

    def close(self) -> None:
        """End the thread after one more try of what is queued; the next process takes up what stays on the local disk."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                if self._queue:
                    self._round()
                self._delete()
        except Exception as error:
            # Talking to the other ranks failed. The run goes on; every later wait says why nothing arrives.
            with self._changed:
                head = self._queue[0][0].manifest.step if self._queue else -1
                self._broken = f"{self.store.where}: uploading stopped: {type(error).__name__}: {error}"
                self._tell("checkpoint_failed", head, reason=self._broken)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._queue:
                if self._deletions:
                    return True
                if self._stopping:
                    return False
                self._changed.wait()
            return True

    def _delete(self) -> None:
        """What `go_back` asked for, once nothing of the abandoned steps waits any more."""
        with self._changed:
            due = list(self._deletions) if not any(saved.aside in self._abandoned for saved, _ in self._queue) else []
        for delete in due:
            try:
                delete()
            except CheckpointError:
                with self._changed:
                    if self._stopping:
                        self._deletions.clear()
                    elif not self._queue:
                        self._changed.wait(ROUND_PAUSE_S)
                return
            with self._changed:
                self._deletions.remove(delete)
                self._changed.notify_all()

    def _round(self) -> None:
        """Try to bring the oldest checkpoint to the store. Collective; ends with all ranks' queues alike."""
        saved, since = self._queue[0]
        with self._changed:
            verdict = "last" if self._stopping else "upload"
            if saved.aside in self._abandoned:
                verdict = "drop"
        verdict = self.ranks.broadcast(verdict)
        if verdict == "drop":
            shutil.rmtree(saved.aside, ignore_errors=True)
            self._pop()
            return
        problem: str | None = None
        try:
            self._put(saved)
        except CheckpointError as error:
            problem = str(error)
        gathered = self.ranks.gather(problem)
        outcome: str | None = None
        if gathered is not None:
            outcome = next((text for text in gathered if text is not None), None)
            if outcome is None:
                try:
                    self._put_manifest(saved)
                except CheckpointError as error:
                    outcome = str(error)
        outcome = self.ranks.broadcast(outcome)
        if outcome is None:
            name = name_attempt(saved.manifest)
            shutil.rmtree(saved.aside, ignore_errors=True)
            if self.ranks.rank == 0:
                with suppress(Exception):  # old ones that cannot be deleted now are deleted after the next
                    self.after()
            self._tell(
                "checkpoint",
                saved.manifest.step,
                path=f"{self.store.where}/{name}",
                bytes=saved.manifest.bytes,
                seconds=round(time.monotonic() - since, 3),
            )
            self._pop()
            return
        if saved.aside != self._delayed:
            self._delayed = saved.aside
            self._tell("checkpoint_delayed", saved.manifest.step, reason=outcome, waiting=len(self._queue))
        if verdict == "last":
            with self._changed:
                self._broken = outcome
                self._queue.clear()
                self._changed.notify_all()
            return
        with self._changed:
            if not self._stopping:
                self._changed.wait(ROUND_PAUSE_S)

    def _put(self, saved: Saved) -> None:
        for file in saved.own_files:
            path = saved.aside / file
            self.store.upload(str(path), name_attempt(saved.manifest), file, path.stat().st_size)

    def _put_manifest(self, saved: Saved) -> None:
        path = saved.aside / MANIFEST
        name = name_attempt(saved.manifest)
        self.store.upload(str(path), name, MANIFEST, path.stat().st_size)
        self.store.source(name).manifest()

    def _pop(self) -> None:
        with self._changed:
            self._abandoned.discard(self._queue.popleft()[0].aside)
            self._changed.notify_all()

    def _tell(self, kind: str, step: int, **fields: object) -> None:
        with self._changed:
            self._events.append(UploadEvent(kind, step, fields))


def take_up(store: RemoteStore, folder: Path) -> list[int]:
    """Upload what an earlier process had written to `folder` and could not bring to the store; returns the steps.

    Only whole checkpoints newer than the store's newest are worth it. The rest is removed. Errors: CheckpointError when
    the store cannot be reached (then nothing is removed).
    """
    steps: list[int] = []
    newest = max((store.step(name) for name in store.names()), default=-1)
    for path in list_left_over(folder):
        try:
            manifest = read_manifest(path)
        except CorruptCheckpointError:
            shutil.rmtree(path, ignore_errors=True)
            continue
        if manifest.step > newest:
            name = name_attempt(manifest)
            for file in (*manifest.files, MANIFEST):
                store.upload(str(path / file), name, file, (path / file).stat().st_size)
            steps.append(manifest.step)
        shutil.rmtree(path, ignore_errors=True)
    return sorted(steps)


def find_waiting_room(config: CheckpointConfig, url: str) -> Path:
    """Find the local folder of checkpoints that are not in the store yet: one for each URL."""
    parent = Path(config.local_path) if config.local_path else Path(tempfile.gettempdir()) / "megalm-checkpoints"
    return parent / compute_checksum(url.encode())
