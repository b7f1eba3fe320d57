"""`megalm inspect checkpoint`."""

import json

import pytest
import torch

import tools.inspect
from megalm.checkpoint.checkpointer import Checkpointer
from megalm.config import CheckpointConfig
from megalm.parallel.slices import Box
from tools.bench.checkpoint._fake_ranks import FakeMesh, Layout
from tools.subcommands import run_tool


def save(folder, step, tensors):
    made = Checkpointer(folder, CheckpointConfig(keep=0), FakeMesh(Layout()))
    boxes = [Box(name, tuple(t.shape), (0,) * t.ndim, t) for name, t in tensors.items()]
    made.save(step, boxes, {"step": step, "tokens": 10 * step, "loader": {"samples": step}}, {}, wait=True)
    made.close()
    return str(folder / f"step-{step:08d}")


@pytest.fixture
def paths(tmp_path):
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    moment = torch.ones(2, 2)
    first = save(tmp_path, 1, {"layers.0.mlp.up.weight": weight, "optimizer.exp_avg.layers.0.mlp.up.weight": moment})
    changed = weight.clone()
    changed[1, 1] = -2.0
    second = save(tmp_path, 2, {"layers.0.mlp.up.weight": changed, "optimizer.exp_avg.layers.0.mlp.up.weight": moment})
    return tmp_path, first, second


def inspect(capsys, *arguments):
    status = run_tool(tools.inspect, ["checkpoint", *map(str, arguments)])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_it_shows_step_tokens_sizes_and_norms(paths, capsys):
    folder, first, _ = paths
    status, out, _ = inspect(capsys, first, "--verify")
    assert status == 0
    assert "step        1, 10 tokens" in out and "4 parameters, float32, 16 B" in out
    assert "every byte matches its checksum" in out
    row = next(line for line in out.splitlines() if line.startswith("layers.0.mlp.up.weight"))
    assert row.split()[1:] == ["2x2", "float32", "5", "4"]
    assert "exp_avg" not in out and "exp_avg" in inspect(capsys, first, "--optimizer")[1]
    status, out, _ = inspect(capsys, folder, "--json")
    found = json.loads(out)
    assert found["step"] == 2 and found["tensors"][0]["norm"] == pytest.approx(29**0.5) and found["world_size"] == 1


def test_it_shows_what_differs(paths, capsys):
    _, first, second = paths
    status, out, _ = inspect(capsys, first, second)
    assert status == 1
    row = next(line for line in out.splitlines() if line.startswith("layers.0.mlp.up.weight"))
    assert row.split()[1:] == ["1", "2", "0.4"]
    assert "loader.samples: 1, 2" in out
    status, out, _ = inspect(capsys, first, first)
    assert status == 0 and "the same" in out


def test_it_finds_damage(paths, capsys):
    folder, first, second = paths
    file = folder / "step-00000002" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[700] ^= 4
    file.write_bytes(data)
    status, _, err = inspect(capsys, second, "--verify")
    assert status == 1 and "__0_0.distcp is not what was written" in err
    file.write_bytes(data[:-1])
    status, _, err = inspect(capsys, second)
    assert status == 1 and "damaged" in err
    assert inspect(capsys, folder, "--json")[1].count('"step": 1')  # the newest good one
    status, _, err = inspect(capsys, folder / "nothing")
    assert status == 2 and "there is no checkpoint" in err
