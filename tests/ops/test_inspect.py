"""`megalm inspect ops`: every op of csrc, and the choice that the backend would make."""

import json

import pytest

from megalm.ops import backend, vendors
from megalm.ops.backend import use_backend
from scripts.build_extension import op_folders
from tools.inspect import ops
from tools.subcommands import run_tool


def test_every_folder_is_listed():
    assert {path.name for path in op_folders()} <= set(ops.OPS.values())


@pytest.mark.skipif(backend.find_library() is None, reason="megalm._C is not built")
def test_native_where_it_is_built():
    with use_backend("auto"):
        rows = ops.describe()["ops"]
    assert {row["chosen"] for row in rows} == {"native"}
    assert all(row["available"][-1] == "reference" for row in rows)


def test_reference_and_why(monkeypatch):
    with use_backend("reference"):
        assert {(row["chosen"], row["why"]) for row in ops.describe()["ops"]} == {
            ("reference", "ops.backend=reference")
        }
    monkeypatch.setattr(backend, "_library", None)
    with use_backend("auto"):
        assert all("make build" in row["why"] for row in ops.describe()["ops"])


def test_a_vendor_is_shown_for_the_ops_that_it_has(monkeypatch):
    fake = vendors.Vendor("apex", {"rms_norm": lambda: None, "adamw_": lambda: None})
    monkeypatch.setattr(vendors, "load", lambda name: fake if name == "apex" else vendors.Vendor(name, why="not here"))
    with use_backend("apex"):
        table = ops.describe()
    chosen = {row["op"]: row["chosen"] for row in table["ops"]}
    assert chosen["adamw_"] == chosen["rms_norm, layer_norm, add_rms_norm, add_layer_norm"] == "apex"
    assert [name for name, where in chosen.items() if where == "apex"] == list(chosen)[:1] + ["adamw_"]
    assert table["vendors"] == {"apex": "installed", "te": "not here"}


def test_command(capsys):
    import tools.inspect

    before = backend.get_backend()
    try:
        assert run_tool(tools.inspect, ["ops", "--json", "--backend", "reference"]) == 0
        assert json.loads(capsys.readouterr().out)["backend"] == "reference"
        assert run_tool(tools.inspect, ["ops", "--backend", "reference"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if line.startswith(("strict", "fast"))]) == 8
        assert run_tool(tools.inspect, ["ops", "--backend", "apex"]) == 2
        assert "another project" in capsys.readouterr().out
    finally:
        backend.set_backend(before)
