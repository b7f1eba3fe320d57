"""What is durable, what is kept, and what is never taken for a checkpoint."""

import errno
import os
import threading
import time

import pytest
import torch

from megalm.checkpoint import commit as commit_module
from megalm.checkpoint import save as save_module
from megalm.checkpoint import staging
from megalm.checkpoint.checkpointer import Checkpointer
from megalm.checkpoint.commit import list_committed, list_superseded
from megalm.checkpoint.errors import CheckpointError, CorruptCheckpointError
from megalm.checkpoint.manifest import compute_checksum
from megalm.checkpoint.reader import CheckpointReader
from megalm.config import CheckpointConfig, ConfigError
from megalm.parallel.slices import Box
from tests.checkpoint.saving import list_names, load_newest, make_box, make_checkpointer, save_steps
from tools.bench.checkpoint._fake_ranks import (
    FakeMesh,
    Layout,
    assert_holds,
    list_boxes_of_rank,
    reference,
    run_threads,
)


def test_newest_and_every_nth_are_kept(tmp_path):
    save_steps(tmp_path, range(10, 80, 10), keep=2, keep_every=30)
    assert list_names(tmp_path) == [f"step-{step:08d}" for step in (30, 60, 70)]


def test_retention_counts_only_good_ones():
    found = [(50, "50"), (40, "40"), (40, "40.old"), (30, "30"), (20, "20"), (10, "10")]

    def gone(keep, keep_every=0, bad=()):
        return list_superseded(found, lambda name: name not in bad, keep, keep_every)

    assert gone(0) == []
    assert gone(1) == ["40", "40.old", "30", "20", "10"]
    assert gone(2, 20) == ["40.old", "30", "10"]
    assert gone(2, bad=("50", "30")) == ["40.old", "30", "10"]
    assert gone(9, bad=[name for _, name in found]) == []
    assert gone(1, bad=("40",)) == ["40", "40.old", "30", "20", "10"]


def test_damaged_checkpoints_do_not_count_towards_keep(tmp_path):
    save_steps(tmp_path, [1, 2], keep=2)
    (tmp_path / "step-00000002" / "state.json").unlink()
    save_steps(tmp_path, [3], keep=2)
    assert list_names(tmp_path) == ["step-00000001", "step-00000003"]


def test_leftovers_are_ignored_and_swept(tmp_path):
    save_steps(tmp_path, [1])
    aside = tmp_path / "step-00000009.tmp-0123456789ab"
    os.rename(tmp_path / "step-00000001", aside)
    (tmp_path / "step-00000008.trash-01234567").mkdir()
    made, _ = make_checkpointer(tmp_path)
    assert made.latest() is None
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        made.load(make_box(0))
    save_steps(tmp_path, [2])
    assert list_names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "ranks.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "torn"])
def test_every_damage_to_every_file_is_found(tmp_path, file, damage):
    save_steps(tmp_path, [1, 2])
    path = tmp_path / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1 << 3
    elif damage == "truncate":
        del data[-1:]
    elif damage == "empty":
        data.clear()
    elif damage == "torn":
        data[-min(len(data), 512) :] = bytes(min(len(data), 512))
    path.write_bytes(data)
    if damage == "remove":
        path.unlink()
    made, events = make_checkpointer(tmp_path)
    assert made.newest_verified() == tmp_path / "step-00000001"
    assert [(kind, step) for kind, step, _ in events] == [("checkpoint_rejected", 2)]
    if damage in ("flip", "torn") and file == ".metadata":  # a pickle for torch's own tools, which a load never reads
        assert load_newest(tmp_path)[:2] == (2, 2.0)
        return
    assert load_newest(tmp_path)[:2] == (1, 1.0)
    step, _, events = load_newest(tmp_path)
    assert events[0][0] == "checkpoint_rejected" and events[0][1] == 2 and str(tmp_path) in events[0][2]["reason"]


def test_every_bit_of_a_manifest_counts(tmp_path):
    save_steps(tmp_path, [1])
    path = tmp_path / "step-00000001" / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(CorruptCheckpointError):
            CheckpointReader(tmp_path / "step-00000001")


def test_no_good_checkpoint_is_an_error_and_no_fresh_start(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "step-00000001" / "manifest.json").write_bytes(b"")
    made, _ = make_checkpointer(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="none of its 1 checkpoints is whole"):
        made.latest()
    with pytest.raises(CorruptCheckpointError):
        made.load(make_box(0))


def test_another_model_is_named_and_nothing_is_overwritten(tmp_path):
    save_steps(tmp_path, [1])
    made, _ = make_checkpointer(tmp_path)
    target = [*make_box(5), Box("layers.0.mlp.up.weight", (2, 3), (0, 0), torch.zeros(2, 3))]
    with pytest.raises(ConfigError, match=r"layers.0.mlp.up.weight: absent in the checkpoint, \[2, 3\] in the model"):
        made.load(target)
    with pytest.raises(ConfigError, match=r"weight: \[1000\] in the checkpoint, \[999\] in the model"):
        made.load(make_box(5, size=999))
    assert (target[0].tensor == 5).all()


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save_steps(tmp_path, [1, 2])
    made, _ = make_checkpointer(tmp_path)
    made.save(2, make_box(22), {"step": 2}, {}, wait=True)
    assert load_newest(tmp_path)[:2] == (2, 22.0)
    assert list_names(tmp_path) == ["step-00000001", "step-00000002"]


def test_between_the_two_renames_the_old_one_is_found(tmp_path, monkeypatch):
    save_steps(tmp_path, [2])
    real = os.rename

    def rename(source, target):
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "injected")
        real(source, target)

    monkeypatch.setattr(commit_module.os, "rename", rename)
    made, events = make_checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="injected"):
        made.save(2, make_box(22), {"step": 2}, {}, wait=True)
    assert load_newest(tmp_path)[:2] == (2, 2.0)
    assert ".old-" in list_names(tmp_path)[0]
    monkeypatch.undo()
    save_steps(tmp_path, [3])
    assert load_newest(tmp_path)[:2] == (3, 3.0)


def test_a_run_that_went_back_forgets_what_came_after(tmp_path):
    save_steps(tmp_path, [1, 2, 3], keep=0)
    made, _ = make_checkpointer(tmp_path)
    made.discard_after(1)
    assert list_names(tmp_path) == ["step-00000001"]
    made.discard_after(0)
    assert list_names(tmp_path) == ["step-00000001"]  # the last one stays


def test_an_asynchronous_save_is_not_touched_by_what_comes_after(tmp_path, monkeypatch):
    gate = threading.Event()
    real = save_module.write_file

    def slow(path, parts):
        gate.wait(10)
        return real(path, parts)

    monkeypatch.setattr(save_module, "write_file", slow)
    made, events = make_checkpointer(tmp_path, keep=0)
    boxes, state, own = make_box(1), {"step": 1}, {"r": 1}
    made.save(1, boxes, state, own)
    boxes[0].tensor.fill_(2)
    state["step"] = own["r"] = 2
    made.poll()
    assert events == [] and list_committed(tmp_path) == []
    threading.Timer(0.2, gate.set).start()
    made.save(2, boxes, state, own)  # waits for the first
    boxes[0].tensor.fill_(3)
    made.wait()
    assert [(kind, step) for kind, step, _ in events] == [("checkpoint", 1), ("checkpoint", 2)]
    first, second = CheckpointReader(tmp_path / "step-00000001"), CheckpointReader(tmp_path / "step-00000002")
    assert (first.tensor("weight") == 1).all() and first.state() == {"step": 1}
    assert (second.tensor("weight") == 2).all() and second.state() == {"step": 2}
    assert made.newest_verified() is not None
    made.close()


def test_large_and_small_pieces_are_copied_by_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "THREAD_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(0)
    # larger than a block, a whole number of blocks, one element, not contiguous, and an odd number of bytes
    made = [torch.randn(shape, generator=generator) for shape in ((300_001,), (2, 131072), (1,), (40, 60))]
    tensors = [*made[:3], made[3].t(), torch.arange(77, dtype=torch.uint8)]
    boxes = [Box(f"w{n}", tuple(t.shape), (0,) * t.dim(), t) for n, t in enumerate(tensors)]
    saver, _ = make_checkpointer(tmp_path)
    for step in (1, 2):
        for tensor in tensors:
            tensor += step
        saver.save(step, boxes, {}, {}, wait=True)
    assert saver.newest_verified() is not None
    reader = CheckpointReader(tmp_path)
    assert all(torch.equal(reader.tensor(box.name), box.tensor) for box in boxes)
    for box in boxes:
        held = box.tensor.contiguous().view(torch.uint8).numpy()
        assert reader.manifest.tensors[box.name].chunks[0].xxh3 == compute_checksum(held)
    saver.close()


def test_a_save_follows_tensors_that_moved(tmp_path):
    """The plan is kept from save to save; what it copies is what it is given."""
    made, _ = make_checkpointer(tmp_path, keep=0)
    first, second = make_box(1), make_box(2)
    for step, boxes in enumerate((first, first, second, first), start=1):
        made.save(step, boxes, {}, {}, wait=True)
    larger = [Box("weight", (1000,), (0,), torch.full((1000,), 5.0, dtype=torch.float64))]
    made.save(5, larger, {}, {}, wait=True)
    made.close()
    found = [CheckpointReader(tmp_path / f"step-{step:08d}").tensor("weight") for step in range(1, 6)]
    assert [tensor.unique().tolist() for tensor in found] == [[1.0], [1.0], [2.0], [1.0], [5.0]]
    assert found[4].dtype == torch.float64


def test_a_staging_buffer_changed_before_it_is_written_is_found(tmp_path, monkeypatch):
    """The checksum is of the tensor, so a copy that goes bad on its way to the disk cannot pass."""
    real = save_module.write_and_commit

    def damaging(request, ranks):
        request.chunks[0].values[17] ^= 1
        return real(request, ranks)

    monkeypatch.setattr("megalm.checkpoint.checkpointer.write_and_commit", damaging)
    save_steps(tmp_path, [1])
    made, _ = make_checkpointer(tmp_path)
    assert made.newest_verified() is None
    with pytest.raises(CorruptCheckpointError, match="weight"):
        made.load(make_box(0))


def test_a_failed_save_is_an_event_and_the_run_goes_on(tmp_path, monkeypatch):
    made, events = make_checkpointer(tmp_path)
    made.save(1, make_box(1), {"step": 1}, {}, wait=True)

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commit_module.os, "write", full)
    made.save(2, make_box(2), {"step": 2}, {})
    with pytest.raises(CheckpointError, match="No space left"):
        made.wait()
    made.save(3, make_box(3), {"step": 3}, {})
    monkeypatch.undo()
    made.save(4, make_box(4), {"step": 4}, {}, wait=True)
    assert [(kind, step) for kind, step, _ in events][1] == ("checkpoint_failed", 2)
    assert events[-1][:2] == ("checkpoint", 4)
    assert "step-00000002" not in list_names(tmp_path) and not [n for n in list_names(tmp_path) if "tmp" in n]


def test_one_failing_rank_fails_the_save_on_all(tmp_path, monkeypatch):
    layout, values = Layout(data=2, zero=True), reference()
    real = save_module.write_file

    def write_file(path, parts):
        if path.name == "__1_0.distcp":
            raise OSError(errno.EIO, "injected")
        return real(path, parts)

    monkeypatch.setattr(save_module, "write_file", write_file)

    def body(ranks):
        made = Checkpointer(tmp_path, CheckpointConfig(), FakeMesh(layout), ranks=ranks)
        with pytest.raises(CheckpointError, match="rank 1: injected"):
            made.save(1, list_boxes_of_rank(layout, ranks.rank, values), {}, {}, wait=True)
        made.close()
        return True

    assert run_threads(2, body) == [True, True]
    assert list_names(tmp_path) == []


def test_boxes_that_do_not_cover_the_model_are_refused(tmp_path):
    values = reference()
    layout = Layout(tensor=2)
    made, _ = make_checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="hold 48 of its 96 elements"):
        made.save(1, list_boxes_of_rank(layout, 0, values), {}, {}, wait=True)
    assert list_names(tmp_path) == []


def test_a_state_that_json_would_change_is_refused(tmp_path):
    made, _ = make_checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="the key 3 is no text"):
        made.save(1, make_box(1), {"a": {3: 4}}, {}, wait=True)
    with pytest.raises(CheckpointError, match="JSON"):
        made.save(1, make_box(1), {"a": object()}, {}, wait=True)


def test_a_named_checkpoint_or_folder_is_loaded(tmp_path):
    save_steps(tmp_path, [1, 2], keep=0)
    assert load_newest(tmp_path, path=tmp_path / "step-00000001")[:2] == (1, 1.0)
    assert load_newest(tmp_path, path=tmp_path)[:2] == (2, 2.0)
    os.rename(tmp_path / "step-00000001", tmp_path / "my-model")
    assert load_newest(tmp_path, path=tmp_path / "my-model")[:2] == (1, 1.0)
    assert CheckpointReader(tmp_path).step == 2


def test_readers_find_a_whole_checkpoint_while_others_are_written_and_deleted(tmp_path):
    save_steps(tmp_path, [1], keep=1)
    done = threading.Event()

    def write():
        save_steps(tmp_path, range(2, 10), keep=1)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    found = []
    while not done.is_set():
        step, value, _ = load_newest(tmp_path)
        assert step == value
        found.append(step)
    writer.join()
    assert found == sorted(found) and load_newest(tmp_path)[:2] == (9, 9.0)


def test_two_writers_do_not_mix(tmp_path):
    """A run that was given up and still saves must not spoil what its successor saves under the same steps."""

    def write(value):
        made, _ = make_checkpointer(tmp_path, keep=0)
        for step in range(1, 7):
            made.save(step, make_box(value + step), {"step": step, "value": value + step}, {})
        made.close()

    writers = [threading.Thread(target=write, args=(value,)) for value in (100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    good = 0
    for path in list_committed(tmp_path):
        reader = CheckpointReader(path)
        assert (reader.tensor("weight") == reader.state()["value"]).all()
        good += 1
    assert good >= 1 and load_newest(tmp_path)[0] >= 1


def test_boxes_survive_a_real_process_group(tmp_path):
    from tests.distributed import run_ranks

    run_ranks(2, _save_and_load, str(tmp_path))
    manifest = CheckpointReader(tmp_path).manifest
    assert manifest.world_size == 2 and manifest.layout["data"] == 2 and manifest.step == 2


def _save_and_load(folder):
    import torch.distributed as dist

    layout, values = Layout(data=2, zero=True), reference()
    made = Checkpointer(folder, CheckpointConfig(), FakeMesh(layout))
    for step in (1, 2):
        made.save(step, list_boxes_of_rank(layout, dist.get_rank(), values), {"step": step}, {"rank": dist.get_rank()})
        dist.all_reduce(torch.ones(3))  # the step's own traffic goes on meanwhile
    made.close()
    boxes = list_boxes_of_rank(layout, dist.get_rank(), None)
    state, own = made.load(boxes)
    assert_holds(boxes, values)
    assert state == {"step": 2} and own == {"rank": dist.get_rank()}


def test_a_new_checkpoint_deletes_an_older_one_once_it_has_proved_good(tmp_path):
    made, _ = make_checkpointer(tmp_path, keep=1)
    for step in (1, 2):
        made.trust(step - 1)
        made.save(step, make_box(step), {"step": step}, {}, wait=True)
        made.trust(step - 1)
        assert list_names(tmp_path)[-1] == f"step-{step:08d}" and len(list_names(tmp_path)) == step
    made.trust(2)
    made.close()
    assert list_names(tmp_path) == ["step-00000002"]


def test_a_checkpoint_that_is_a_link_is_deleted_and_not_what_it_leads_to(tmp_path):
    save_steps(tmp_path / "elsewhere", [1])
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "step-00000001").symlink_to("../elsewhere/step-00000001")
    (tmp_path / "place" / "step-00000002").symlink_to("../gone")
    save_steps(tmp_path / "place", [2, 3], keep=1)
    assert list_names(tmp_path / "place") == ["step-00000003"]
    assert list_names(tmp_path / "elsewhere" / "step-00000001")


def test_links_that_are_set_aside_lead_where_they_led(tmp_path):
    save_steps(tmp_path / "elsewhere", [1])
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "step-00000001").symlink_to("../elsewhere/step-00000001")
    aside = commit_module.set_aside(tmp_path / "place", ["step-00000001"])
    assert CheckpointReader(aside / "step-00000001").step == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_fail_a_save_that_must_have_none(tmp_path, value, dtype):
    made, _ = make_checkpointer(tmp_path)
    boxes = [Box("weight", (1000,), (0,), torch.full((1000,), 3e38, dtype=dtype))]  # whose sum is infinite, and fine
    made.save(1, boxes, {"step": 1}, {}, wait=True, only_finite=True)
    boxes[0].tensor[777] = value
    with pytest.raises(CheckpointError, match="weight holds values that are not finite"):
        made.save(2, boxes, {"step": 2}, {}, wait=True, only_finite=True)
    assert list_names(tmp_path) == ["step-00000001"]


def _talk_while_saving(folder):
    from types import SimpleNamespace

    import torch.distributed as dist

    from megalm.config import ParallelConfig
    from megalm.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig(data=2), "cpu")
    checkpointer = Checkpointer(folder, CheckpointConfig(), mesh)
    write = checkpointer._write

    def write_late(request):
        time.sleep(0.3 * (dist.get_rank() + 1))  # whoever talks now is heard by the other rank's save
        return write(request)

    checkpointer._write = write_late
    heard = []
    for step in (1, 2, 3):
        checkpointer.save(step, make_box(step), {"step": step}, {})
        heard.append(checkpointer.broadcast(SimpleNamespace(step=step, text="x" * 700)).step)
        assert checkpointer.durable == step
    checkpointer.close()
    return heard


def test_ranks_may_talk_while_a_save_is_being_written(tmp_path):
    from tests.distributed import run_ranks

    assert run_ranks(2, _talk_while_saving, str(tmp_path)) == [[1, 2, 3]] * 2
