"""What a run writes down line by line, and how it is read again: events.jsonl and metrics.jsonl."""

from megalm.journal.events import EventLog, read_events
from megalm.journal.lines import AppendedFile, parse_json_lines, read_json_lines
from megalm.journal.numbers import encode_json, format_number, read_number
from megalm.journal.steps import Course, choose_course, read_course, read_steps
from megalm.journal.words import QUIET, describe_event, describe_event_details

__all__ = [
    "QUIET",
    "AppendedFile",
    "Course",
    "EventLog",
    "read_number",
    "choose_course",
    "describe_event",
    "describe_event_details",
    "encode_json",
    "format_number",
    "parse_json_lines",
    "read_course",
    "read_events",
    "read_json_lines",
    "read_steps",
]
