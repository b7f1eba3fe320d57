"""A disk that is full: what is given up for a new checkpoint, and what never is."""

import errno
import os

import pytest

from megalm.checkpoint import commit as commit_module
from megalm.checkpoint.commit import list_committed
from megalm.checkpoint.errors import CheckpointError
from tests.checkpoint.saving import list_names, make_box, make_checkpointer, save_steps


class SmallDisk:
    """Writes fail as on a full disk once the folder's files would hold more than so many bytes."""

    def __init__(self, folder, size, monkeypatch):
        self.folder, self.size, self.write = folder, size, os.write
        monkeypatch.setattr(commit_module.os, "write", self)

    def __call__(self, descriptor, data):
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        if used + len(data) > self.size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(descriptor, data)


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [4, 3]), (3, [4, 3, 2])])
def test_a_full_disk_gives_up_before_the_save_what_retention_would_delete_after_it(tmp_path, monkeypatch, keep, left):
    save_steps(tmp_path, [1, 2, 3], keep=0)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    SmallDisk(tmp_path, used + 100, monkeypatch)
    events = save_steps(tmp_path, [4], keep=keep)
    assert [kind for kind, *_ in events] == ["checkpoint"]
    assert [commit_module.parse_step(path) for path in list_committed(tmp_path)] == left


def test_a_full_disk_never_costs_the_last_good_checkpoint(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    SmallDisk(tmp_path, 1000, monkeypatch)
    made, events = make_checkpointer(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="No space left"):
        made.save(2, make_box(2), {"step": 2}, {}, wait=True)
    assert list_names(tmp_path) == ["step-00000001"] and [kind for kind, *_ in events] == ["checkpoint_failed"]


def test_a_failure_is_not_forgotten_before_a_save_succeeds(tmp_path, monkeypatch):
    for asynchronous in (True, False):
        made, _ = make_checkpointer(tmp_path, asynchronous=asynchronous)
        with monkeypatch.context() as patched:
            SmallDisk(tmp_path, 0, patched)
            made.save(1, make_box(1), {"step": 1}, {})
            assert "No space" in str(made.settle())
        with pytest.raises(CheckpointError, match="No space"):
            made.wait()
        made.save(2, make_box(2), {"step": 2}, {})
        made.wait()
        assert made.settle() is None and made.durable == 2
