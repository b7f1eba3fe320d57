"""Files of lines after crashes, full disks and power cuts: read as far as they are whole, and appended to again."""

import errno
import json
import logging
import os

import pytest

from megalm.journal import AppendedFile, EventLog, read_events, read_json_lines, read_steps

ONE, TWO, THREE = ({"time": float(step), "step": step, "kind": "skip", "decision": {"step": 9}} for step in (1, 2, 3))
A, B, C = (json.dumps(event).encode() + b"\n" for event in (ONE, TWO, THREE))

DAMAGED = {
    "nothing": (b"", [], None),
    "whole": (A + B + C, [ONE, TWO, THREE], None),
    "torn at the end": (A + B + C[:-12], [ONE, TWO], None),
    "only the end of the last line is missing": (A + B + C[:-1], [ONE, TWO, THREE], None),
    "torn in an inner object": (A + B + C[: C.index(b"}") + 1], [ONE, TWO], None),
    "a good line behind a torn one": (A + B[:-12] + C, [ONE, THREE], 2),
    "a torn line, and its end": (A + B[:-12] + b"\n" + C, [ONE, THREE], 2),
    "the first line torn": (A[:5] + b"\n" + B + C, [TWO, THREE], 1),
    "the first line torn, and one behind it": (A[:20] + B + C, [TWO, THREE], 1),
    "a line of zeros": (A + b"\0" * 40 + b"\n" + B, [ONE, TWO], None),
    "zeros before a line": (A + b"\0" * 40 + B + C, [ONE, TWO, THREE], None),
    "zeros at the end": (A + B + b"\0" * 4096, [ONE, TWO], None),
    "nothing but zeros": (b"\0" * 4096, [], None),
    "half a character at the end": (A + B + '{"time": 3.0, "text": "é'.encode()[:-1], [ONE, TWO], None),
    "half a character": (A + '{"time": 3.0, "text": "é'.encode()[:-1] + b'"}\n' + C, [ONE, THREE], 2),
    "no object": (A + b"5\n" + C, [ONE, THREE], 2),
    "a list": (A + b"[1]\n" + C, [ONE, THREE], 2),
    "an object of something else": (A + b'{"loss": 3}\n' + C, [ONE, THREE], 2),
    "very deep": (A + b"[" * 200000 + b"\n" + C, [ONE, THREE], 2),
    "a mark of utf-8, and lines of Windows": (b"\xef\xbb\xbf" + (A + B).replace(b"\n", b"\r\n"), [ONE, TWO], None),
    "empty lines": (A + b"\n\n" + B, [ONE, TWO], None),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_whole_is_read_and_damage_in_the_middle_is_told_once(tmp_path, caplog, name):
    text, expected, line = DAMAGED[name]
    path = tmp_path / "events.jsonl"
    path.write_bytes(text)
    with caplog.at_level(logging.WARNING):
        assert read_events(path) == expected
        assert read_events(path) == expected
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (line is not None)
    assert line is None or f"{path}, line {line} is damaged" in told[0]


@pytest.mark.parametrize("name", DAMAGED)
def test_the_writer_goes_on_behind_whatever_was_left(tmp_path, name):
    text, expected, _ = DAMAGED[name]
    path = tmp_path / "events.jsonl"
    path.write_bytes(text)
    for step in (10, 11):
        log = EventLog(path)
        log.write("skip", step=step)
        log.close()
    assert [event["step"] for event in read_events(path)] == [event["step"] for event in expected] + [10, 11]
    new = path.read_bytes().split(b"\n")
    assert new[-1] == b"" and [json.loads(line)["step"] for line in new[-3:-1]] == [10, 11]


def test_at_whatever_byte_a_file_is_cut_its_whole_lines_are_read_and_it_can_be_continued(tmp_path):
    path, text = tmp_path / "events.jsonl", A + B
    for size in range(len(text) + 1):
        path.write_bytes(text[:size])
        whole = [ONE, TWO][: text[:size].count(b"}}\n") + text[:size].endswith(b"}}")]
        assert read_events(path) == whole, size
        file = AppendedFile(path)
        file.append(C.decode().strip())
        file.close()
        assert path.read_bytes() == b"".join([A, B][: len(whole)]) + C, size


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_json_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "row", [{"loss": 1.0}, {"step": "three"}, {"step": 1.5}, {"step": None}, {"step": float("nan")}]
)
def test_a_step_without_its_number_is_no_step(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps(row) + "\n" + json.dumps({"step": 2.0}) + "\n")
    assert read_steps(path) == [{"step": 1}, {"step": 2}]


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes 7 more bytes of each write, and then nothing, while `full`."""
    state, write = {"full": False}, os.write

    def writes(file, data):
        if not state["full"]:
            return write(file, data)
        if len(data) > 7:
            return write(file, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megalm.journal.lines.os.write", writes)
    return state


def test_a_full_disk_keeps_lines_waiting_and_loses_none(tmp_path, full_disk, caplog):
    path, heard = tmp_path / "events.jsonl", []
    log = EventLog(path)
    log.listeners.append(heard.append)
    log.write("skip", step=1)
    full_disk["full"] = True
    log.write("skip", step=2)
    log.write("skip", step=3)
    assert [event["step"] for event in read_events(path)] == [1] and path.read_bytes().endswith(b"\n")
    assert [event["kind"] for event in heard] == ["skip", "warning", "skip", "skip"]
    assert "cannot be written" in heard[1]["text"] and caplog.text.count("cannot be written") == 1
    full_disk["full"] = False
    log.write("skip", step=4)
    log.close()
    assert [event["step"] for event in read_events(path)] == [1, 2, 3, 4]


def test_what_the_disk_never_took_is_said_at_the_end(tmp_path, full_disk, caplog):
    file = AppendedFile(tmp_path / "metrics.jsonl")
    full_disk["full"] = True
    assert not file.append('{"step": 1, "loss": 2}')
    file.close()
    assert "its last 1 lines are lost" in caplog.text and (tmp_path / "metrics.jsonl").read_bytes() == b""
