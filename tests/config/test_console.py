"""Whatever a file is called, and whatever the terminal knows: a program's outcome is printed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megalm
from megalm.config.console import escape_what_cannot_be_written

NAMES = [b"caf\xe9.jsonl", "日本語.jsonl".encode(), b"\xff\xfe\x80.jsonl"]


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("utf-8", "caf\udce9 日本", "caf\\udce9 日本".encode()),
        ("ascii", "日本 é", b"\\u65e5\\u672c \\xe9"),
        ("latin-1", "é \U0001f600", b"\xe9 \\U0001f600"),
    ],
)
def test_what_a_stream_cannot_write_is_escaped(monkeypatch, encoding, text, expected):
    for name in ("stdout", "stderr"):
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            stream = io.TextIOWrapper(written, encoding, errors="strict")
            patch.setattr(sys, name, stream)
            escape_what_cannot_be_written()
            print(text, file=stream, end="", flush=True)
        assert written.getvalue() == expected


def test_a_stream_that_is_no_terminal_is_left_alone(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    escape_what_cannot_be_written()
    assert sys.stdout is stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    (folder / "n").mkdir()
    for name in NAMES:
        with open(os.path.join(os.fsencode(folder / "n"), name), "wb") as file:
            file.write(b'nope\n{"text": "the same in all"}\n')
    return folder


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
@pytest.mark.parametrize("tool", ["dedup", "dedup as JSON", "tokenize", "tokenize as JSON"])
def test_the_data_tools_print_any_name(folder, tool, encoding):
    output = f"{tool.replace(' ', '-')}-{encoding[:3]}"
    commands = {
        "dedup": ["exact", "n", "--output", f"{output}.jsonl", "--removed", f"{output}.gone"],
        "tokenize": ["n", "--train-bpe", "260", "--output", output, "--report"],
    }
    name = tool.split()[0]
    command = [sys.executable, "-m", f"tools.{name}", *commands[name], "--skip-bad", "--workers", "1"]
    command += ["--json"] * tool.endswith("JSON")
    root = str(Path(megalm.__file__).parents[1])
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": root}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    said = (done.stdout + done.stderr).decode(encoding[:5])
    assert done.returncode == 0 and "Traceback" not in said, said
    if tool.endswith("JSON"):
        answer = json.loads(done.stdout.decode(encoding[:5]).splitlines()[-1])
        names = [os.fsdecode(name) for name in NAMES]
        listed = answer.get("skipped") or answer["listed"]
        assert all(any(name in line for line in listed) for name in names)
    else:
        assert "caf\\udce9.jsonl" in said and "\\udcff\\udcfe\\udc80.jsonl" in said
    if name == "dedup":
        with open(folder / f"{output}.gone", "rb") as file:
            rows = [json.loads(line) for line in file]
        files = {row["file"] for row in rows}
        assert {os.fsencode(os.path.basename(path)) for path in files} == set(NAMES)
        assert all(os.path.exists(os.path.join(folder, path)) for path in files)
