"""Events are on the disk before anybody hears of them, and who only listens can stop nobody."""

import json
import logging
import math

from megalm.journal import EventLog, read_events


def test_a_listener_that_fails_is_logged_once_and_stops_nobody(tmp_path, caplog):
    heard = []

    def broken(event):
        raise ValueError(f"cannot show {event['kind']}")

    log = EventLog(tmp_path / "events.jsonl")
    log.listeners += [broken, heard.append]
    with caplog.at_level(logging.ERROR):
        log.write("spike", step=3, loss=math.nan)
        log.write("skip", step=3)
    log.close()
    assert [event["kind"] for event in heard] == ["spike", "skip"]
    assert [event["kind"] for event in read_events(tmp_path / "events.jsonl")] == ["spike", "skip"]
    assert len(caplog.records) == 1 and "broken" in caplog.text and "cannot show spike" in caplog.text


def test_the_disk_has_an_event_when_the_listeners_hear_of_it(tmp_path):
    path, seen = tmp_path / "events.jsonl", []
    log = EventLog(path)
    log.listeners.append(lambda event: seen.append(json.loads(path.read_text().splitlines()[-1])["step"]))
    for step in (1, 2):
        log.write("skip", step=step)
    log.close()
    assert seen == [1, 2]


def test_other_ranks_write_nothing(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", writes=False)
    log.listeners.append(lambda event: 1 / 0)
    log.write("skip", step=1)
    log.close()
    assert not (tmp_path / "events.jsonl").exists()
