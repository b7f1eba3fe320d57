"""Saved on one layout, loaded on another: the same values, bit by bit."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from megalm.checkpoint import planner as planner_module
from megalm.checkpoint.checkpointer import Checkpointer
from megalm.checkpoint.planner import BoxLoadPlanner, BoxSavePlanner
from megalm.checkpoint.reader import CheckpointReader
from megalm.config import CheckpointConfig
from megalm.parallel.slices import Box
from tools.bench.checkpoint._fake_ranks import (
    FakeMesh,
    Layout,
    assert_holds,
    list_boxes_of_rank,
    reference,
    run_threads,
)

LAYOUTS = [
    Layout(),
    Layout(data=2),
    Layout(data=3, zero=True),
    Layout(tensor=2),
    Layout(tensor=4, data=2, zero=True),
    Layout(pipeline=2, interleave=True),
    Layout(pipeline=4, data=2, zero=True),
    Layout(pipeline=2, tensor=2, data=3, zero=True, interleave=True),
]


def save(folder, layout, values, step=7):
    def body(ranks):
        checkpointer = Checkpointer(folder, CheckpointConfig(), FakeMesh(layout), ranks=ranks)
        state = {"step": step, "tokens": 100 * step}
        checkpointer.save(step, list_boxes_of_rank(layout, ranks.rank, values), state, {"rank": ranks.rank}, wait=True)
        checkpointer.close()

    run_threads(layout.world, body)


def load(folder, layout, values, **options):
    def body(ranks):
        checkpointer = Checkpointer(folder, CheckpointConfig(), FakeMesh(layout), ranks=ranks)
        boxes = list_boxes_of_rank(layout, ranks.rank, None)
        result = checkpointer.load(boxes, **options)
        if options.get("weights_only"):
            assert all(box.tensor.isnan().all() for box in boxes if box.name.startswith("optimizer."))
            boxes = [box for box in boxes if not box.name.startswith("optimizer.")]
        assert_holds(boxes, values)
        return result

    return run_threads(layout.world, body)


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_every_layout_loads_every_other(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(planner_module, "CHUNK_BYTES", 64)  # boxes are cut, so that readers meet pieces of pieces
    values = reference()
    save(tmp_path, saved, values)
    assert len(CheckpointReader(tmp_path).manifest.tensors["layers.0.mlp.experts"].chunks) >= 6
    for target in LAYOUTS:
        results = load(tmp_path, target, values)
        for rank, (state, own) in enumerate(results):
            assert state == {"step": 7, "tokens": 700}
            same = (saved.world, saved.data, saved.tensor) == (target.world, target.data, target.tensor)
            assert own == ({"rank": rank} if same else None)


def test_weights_only_leaves_the_optimizer_alone(tmp_path):
    values = reference()
    save(tmp_path, LAYOUTS[4], values)
    assert all(own is None for _, own in load(tmp_path, LAYOUTS[4], values, weights_only=True))


def test_replicas_are_written_once_and_evenly(tmp_path):
    layout = Layout(data=4)
    save(tmp_path, layout, reference())
    total = sum(tensor.nbytes for tensor in reference().values())
    shares = [0] * 4
    manifest = CheckpointReader(tmp_path).manifest
    for tensor in manifest.tensors.values():
        for chunk in tensor.chunks:
            shares[int(chunk.file.split("_")[2])] += chunk.region.numel * 4
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 13 * 8 * 4  # the largest tensor


def test_a_reader_gives_whole_tensors(tmp_path):
    values = reference()
    save(tmp_path, LAYOUTS[-1], values)
    reader = CheckpointReader(tmp_path)
    assert reader.step == 7 and reader.state()["tokens"] == 700
    found = dict(reader.tensors(optimizer=True))
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)
    assert set(reader.names()) == {name for name in values if not name.startswith("optimizer.")}


def test_torch_reads_our_folder(tmp_path):
    values = reference()
    save(tmp_path, LAYOUTS[-1], values)
    state_dict = {name: torch.full_like(tensor, float("nan")) for name, tensor in values.items()}
    dcp.load(state_dict, checkpoint_id=tmp_path / "step-00000007", no_dist=True)
    assert all(torch.equal(state_dict[name], values[name]) for name in values)


def test_our_planners_work_with_torchs_storage(tmp_path):
    values = reference()
    layout = Layout(data=2, zero=True)
    boxes = list_boxes_of_rank(layout, 0, values) + list_boxes_of_rank(layout, 1, values)
    dcp.save({}, storage_writer=FileSystemWriter(tmp_path), planner=BoxSavePlanner(boxes), no_dist=True)
    target = list_boxes_of_rank(Layout(tensor=2), 1, None)
    dcp.load({}, storage_reader=FileSystemReader(tmp_path), planner=BoxLoadPlanner(target), no_dist=True)
    assert_holds(target, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_types_and_odd_shapes_come_back(tmp_path, dtype):
    tensors = {
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "one": torch.ones(1, 1, 1).to(dtype),
        "transposed": (torch.arange(15.0) * 7).reshape(3, 5).to(dtype).t(),
    }

    def boxes(values):
        return [Box(name, tuple(t.shape), (0,) * t.ndim, t) for name, t in values.items()]

    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), FakeMesh(Layout()))
    checkpointer.save(1, boxes(tensors), {}, {}, wait=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpointer.load(boxes(found))
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
