"""What a run writes down line by line, and how it is read again: events.jsonl and metrics.jsonl."""

from megalm.journal.events import EventLog, read_events
from megalm.journal.lines import AppendedFile, parse_json_lines, read_json_lines
from megalm.journal.numbers import as_number, json_text, number_text
from megalm.journal.steps import Course, course_of, read_course, read_steps
from megalm.journal.words import QUIET, event_text, event_words

__all__ = [
    "QUIET",
    "AppendedFile",
    "Course",
    "EventLog",
    "as_number",
    "course_of",
    "event_text",
    "event_words",
    "json_text",
    "number_text",
    "parse_json_lines",
    "read_course",
    "read_events",
    "read_json_lines",
    "read_steps",
]
