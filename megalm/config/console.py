"""What a program prints: any name of a file and any text, whatever the terminal can write."""

import io
import sys


def escape_what_cannot_be_written() -> None:
    """From now on a character that standard output or error cannot write appears as its escape (`\\udce9`, `\\u65e5`).

    A file's name may hold bytes that are no UTF-8, and a terminal may know ASCII alone: without this, work that is done
    would end in an error where its outcome is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a caller has put something else
            stream.reconfigure(errors="backslashreplace")
