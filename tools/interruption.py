"""Ctrl-C in the data tools: what is done stays, and the prompt comes back at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

GRACE = 1.5  # seconds to end in good order; a library may be in the middle of sorting
INTERRUPTED = 130


@contextlib.contextmanager
def interrupt_promptly() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM raise KeyboardInterrupt; if the program is not over GRACE seconds later, or at the
    second signal, it ends as if killed, after which the same command goes on all the same."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch() -> None:
        count = 0
        while (seen := os.read(reader, 1)) and not over.is_set():
            count += seen[0] in (signal.SIGINT, signal.SIGTERM)
            if count == 1:
                threading.Timer(GRACE, end).start()
            elif count > 1:
                end()

    def end() -> None:
        if not over.is_set():
            sys.stderr.write("interrupted in the middle of a step; the same command goes on from what is done\n")
            sys.stderr.flush()
            os._exit(INTERRUPTED)

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: None)  # the second one is the watcher's
        raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not where nohup turned it off
            before[number] = signal.signal(number, interrupt)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)
        watcher.join()
        os.close(reader)
