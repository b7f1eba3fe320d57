"""Checkpoints in an object store: outages, bounded queues, restarts, damage."""

import os
import time
import uuid

import fsspec
import pytest
import torch

from megalm.checkpoint import checkpointer, remote, upload
from megalm.checkpoint.address import read_url
from megalm.checkpoint.checkpointer import Checkpointer
from megalm.checkpoint.errors import CheckpointError
from megalm.checkpoint.reader import CheckpointReader
from megalm.config import CheckpointConfig, ConfigError
from megalm.parallel.slices import Box
from tools.bench.checkpoint._fake_ranks import (
    FakeMesh,
    Layout,
    ThreadRanks,
    assert_holds,
    list_boxes_of_rank,
    reference,
    run_threads,
)

SINGLE = FakeMesh(Layout())


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(upload, "ROUND_PAUSE_S", 0.01)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://bucket-{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/bucket/run"


def open_(url, tmp_path, **options):
    events = []
    options.setdefault("upload_timeout_s", 20.0)
    config = CheckpointConfig(local_path=str(tmp_path / "local"), **options)
    made = Checkpointer(url, config, SINGLE, events=lambda kind, *, step, **fields: events.append((kind, step)))
    return made, events


def box(value):
    return [Box("weight", (100,), (0,), torch.full((100,), float(value)))]


def value_of(made, **options):
    target = box(float("nan"))
    state, _ = made.load(target, **options)
    return state["step"], target[0].tensor[0].item()


def waiting(tmp_path):
    return [name for _, folders, _ in os.walk(tmp_path / "local") for name in folders if name.startswith("step-")]


class Away:
    """Makes every request of a file system class fail while it is on."""

    def __init__(self, monkeypatch, url):
        self.on, self.requests = False, 0
        kind = type(fsspec.core.url_to_fs(url)[0])
        for method in ("cat_file", "put_file", "ls", "glob", "info", "rm_file"):
            monkeypatch.setattr(kind, method, self._failing(getattr(kind, method)))

    def _failing(self, real):
        def method(*args, **kwargs):
            self.requests += 1
            if self.on:
                raise ConnectionError("503 slow down")
            return real(*args, **kwargs)

        return method


def test_a_checkpoint_goes_to_the_store_and_comes_back(url, tmp_path):
    made, events = open_(url, tmp_path, keep=2, upload_queue=4)  # room for all, however slow the store
    assert made.latest() is None
    for step in (1, 2, 3):
        made.save(step, box(step), {"step": step}, {})
    made.wait()
    assert events == [("checkpoint", 1), ("checkpoint", 2), ("checkpoint", 3)]
    assert value_of(made) == (3, 3.0)
    assert [name.partition(".")[0] for name in made.store.names()] == ["step-00000003", "step-00000002"]
    assert waiting(tmp_path) == []
    made.close()
    fresh, _ = open_(url, tmp_path)
    assert value_of(fresh) == (3, 3.0) and fresh.newest_verified() == fresh.latest()
    assert value_of(fresh, path=fresh.latest()) == (3, 3.0)
    reader = CheckpointReader(url)
    assert reader.step == 3 and (reader.tensor("weight") == 3).all()
    fresh.discard_after(2)
    assert value_of(fresh) == (2, 2.0)
    fresh.close()


def test_a_step_saved_twice_gives_the_second(url, tmp_path):
    made, _ = open_(url, tmp_path)
    for value in (1, 2):
        made.save(5, box(value), {"step": 5}, {}, wait=True)
    made.close()
    made, _ = open_(url, tmp_path)
    assert value_of(made) == (5, 2.0) and len(made.store.names()) == 1
    made.close()


def test_the_run_goes_on_through_an_outage_and_catches_up(url, tmp_path, monkeypatch):
    away = Away(monkeypatch, url)
    made, events = open_(url, tmp_path, keep=0, upload_queue=3)
    made.save(1, box(1), {"step": 1}, {}, wait=True)
    away.on = True
    for step in (2, 3, 4):
        begun = time.monotonic()
        made.save(step, box(step), {"step": step}, {})
        made.poll()
        assert time.monotonic() - begun < 2
    deadline = time.monotonic() + 10
    while ("checkpoint_delayed", 2) not in events and time.monotonic() < deadline:
        made.poll()
        time.sleep(0.01)
    away.on = False
    made.wait()
    assert [e for e in events if e[0] == "checkpoint"] == [("checkpoint", step) for step in (1, 2, 3, 4)]
    assert ("checkpoint_delayed", 2) in events
    assert value_of(made) == (4, 4.0)
    made.close()


@pytest.mark.parametrize("moment", ["arrived", "waiting", "away"])
def test_what_a_run_went_back_on_does_not_come_back_from_the_queue(url, tmp_path, monkeypatch, moment):
    monkeypatch.setattr(checkpointer, "_DELETION_PATIENCE_S", 0.3)
    away = Away(monkeypatch, url)
    made, events = open_(url, tmp_path, keep=0)
    made.save(1, box(1), {"step": 1}, {}, wait=True)
    away.on = moment == "waiting"
    made.save(2, box(2), {"step": 2}, {}, wait=moment != "waiting")
    made.settle()
    away.on = moment != "arrived"
    begun = time.monotonic()
    made.discard_after(1)
    assert time.monotonic() - begun < 5
    away.on = False
    made.wait()
    assert value_of(made) == (1, 1.0) and waiting(tmp_path) == []
    assert (("checkpoint_dropped", 2) in events) == (moment == "waiting")
    made.save(2, box(22), {"step": 2}, {}, wait=True)  # trained again
    assert value_of(made) == (2, 22.0)
    made.close()


def test_a_long_outage_gives_up_the_oldest_and_keeps_the_newest(url, tmp_path, monkeypatch):
    away = Away(monkeypatch, url)
    made, events = open_(url, tmp_path, upload_queue=2)
    away.on = True
    for step in range(1, 7):
        made.save(step, box(step), {"step": step}, {})
        made.settle()
        time.sleep(0.05)
    deadline = time.monotonic() + 10
    while len(waiting(tmp_path)) > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(waiting(tmp_path)) == 2
    away.on = False
    made.wait()
    assert [e for e in events if e[0] == "checkpoint_dropped"] == [("checkpoint_dropped", n) for n in (1, 2, 3, 4)]
    assert [e for e in events if e[0] == "checkpoint"] == [("checkpoint", 5), ("checkpoint", 6)]
    made.close()


def test_what_could_not_be_uploaded_is_said_kept_and_taken_up_by_the_next_process(url, tmp_path, monkeypatch):
    away = Away(monkeypatch, url)
    made, events = open_(url, tmp_path, upload_timeout_s=0.2)
    made.save(1, box(1), {"step": 1}, {}, wait=True)
    away.on = True
    with pytest.raises(CheckpointError, match="not uploaded: step 2, which are in"):
        made.save(2, box(2), {"step": 2}, {}, wait=True)
    made.close()
    assert len(waiting(tmp_path)) == 1
    with pytest.raises(CheckpointError, match="cannot be reached"):  # and not: no checkpoint, begin at step 0
        open_(url, tmp_path)
    away.on = False
    fresh, _ = open_(url, tmp_path)
    assert value_of(fresh) == (2, 2.0) and waiting(tmp_path) == []
    fresh.close()


def test_hiccups_are_tried_again(url, tmp_path, monkeypatch):
    made, events = open_(url, tmp_path)
    kind, failures = type(made.store.files), [0]
    for method in ("put_file", "cat_file", "ls"):
        real = getattr(kind, method)

        def flaky(*args, _real=real, **kwargs):
            failures[0] += 1
            if failures[0] % 3 == 1:
                raise TimeoutError("slow")
            return _real(*args, **kwargs)

        monkeypatch.setattr(kind, method, flaky)
    made.save(1, box(1), {"step": 1}, {}, wait=True)
    assert value_of(made) == (1, 1.0)
    assert events == [("checkpoint", 1)]
    made.close()


@pytest.mark.parametrize("damage", ["no manifest", "truncated", "flipped"])
def test_damage_in_the_store_falls_back(url, tmp_path, damage):
    made, events = open_(url, tmp_path)
    for step in (1, 2):
        made.save(step, box(step), {"step": step}, {}, wait=True)
    folder = f"{made.store.root}/{made.store.names()[0]}"
    files = made.store.files
    if damage == "no manifest":
        files.rm_file(f"{folder}/manifest.json")
    else:
        data = bytearray(files.cat_file(f"{folder}/__0_0.distcp"))
        data[700] ^= 1
        files.pipe_file(f"{folder}/__0_0.distcp", bytes(data[:-1] if damage == "truncated" else data))
    assert value_of(made) == (1, 1.0)
    assert (("checkpoint_rejected", 2) in events) == (damage != "no manifest")
    made.save(3, box(3), {"step": 3}, {}, wait=True)  # its retention removes what has no manifest
    assert value_of(made) == (3, 3.0)
    if damage == "no manifest":
        assert not files.exists(folder)
    made.close()


def test_two_ranks_upload_their_own_files(tmp_path):
    layout, values = Layout(data=2, zero=True), reference()
    url = f"memory://bucket-{uuid.uuid4().hex}/run"

    # Each rank with a local folder of its own, as on two nodes.
    shared: dict = {}

    def body(ranks):
        import threading

        if ranks.rank == 0:
            shared.update(slots=[None] * 2, barrier=threading.Barrier(2))
        ranks.broadcast(None)
        config = CheckpointConfig(local_path=str(tmp_path / f"node-{ranks.rank}"))
        talk = ThreadRanks(ranks.rank, 2, shared)
        made = Checkpointer(url, config, FakeMesh(layout), ranks=ranks, upload_ranks=talk)
        for step in (1, 2):
            made.save(
                step, list_boxes_of_rank(layout, ranks.rank, values), {"step": step}, {"rank": ranks.rank}, wait=True
            )
        boxes = list_boxes_of_rank(layout, ranks.rank, None)
        state, own = made.load(boxes)
        assert_holds(boxes, values)
        assert state == {"step": 2} and own == {"rank": ranks.rank}
        made.close()
        return True

    assert run_threads(2, body) == [True, True]
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(CheckpointReader(url).manifest.files)


def test_an_unknown_protocol_is_a_message(tmp_path):
    with pytest.raises(ConfigError, match="nosuch://bucket"):
        open_("nosuch://bucket/run", tmp_path)


def test_what_is_set_aside_in_a_store_is_whole_and_does_not_count(url, tmp_path):
    made, _ = open_(url, tmp_path, keep=0)
    for step in (1, 2, 3):
        made.save(step, box(step), {"step": step}, {}, wait=True)
    moved = made.place.set_aside_after(1)
    assert moved is not None and moved.steps == [2, 3]
    assert [made.store.step(name) for name in made.store.names()] == [1]
    state, _ = made.load(box(0), path=moved.where)
    assert state["step"] == 3
    made.close()


def test_a_store_belongs_to_one_run_and_must_take_what_is_written(url, tmp_path, monkeypatch):
    made, _ = open_(url, tmp_path)
    made.place.claim("a")
    made.place.claim("a")
    with pytest.raises(ConfigError, match="where the run 'a' saves"):
        made.place.claim("b")
    made.prepare(box(1))
    assert made.store.names() == []

    def refuse(*given, **more):
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(type(made.store.files), "pipe_file", refuse)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)
    with pytest.raises(CheckpointError, match="403 Forbidden"):
        made.prepare(box(1))
    made.close()


def test_a_file_url_is_an_absolute_path_however_it_was_written(tmp_path):
    assert read_url("file:///a/b") == read_url("file:/a/b") == "file:///a/b"
    assert read_url("s3:/bucket/run") == "s3://bucket/run" and read_url("/a/b") is None
