"""Where ranks come from: a process that has imported everything and forks. So a rank that is lost is there again in a
fraction of a second, and several ranks import once.

It is started early, beside the planning, and before anything here touches a GPU or starts a thread: what it forks has
neither. It hears no signal that is meant for the launcher, and ends when nobody is left who could ask it for a rank.
"""

import os
import signal
from multiprocessing import context, forkserver, get_context, resource_tracker

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What tells a launcher to save and end."""
_PRELOADED = ["megalm.launch.rank_process", "megalm.launch.worker"]


def prepare_ranks(threads: int) -> context.ForkServerContext:
    """Start the process that ranks are forked from, if it does not run yet; returns at once.

    threads: of each rank, unless OMP_NUM_THREADS says it; libraries read it when they are loaded.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    made = get_context("forkserver")
    made.set_forkserver_preload(_PRELOADED)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: a signal to the whole group leaves it alone
    try:
        resource_tracker.ensure_running()  # which lets some of them through again
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return made


def hear_signals_again() -> None:
    """Undo in a rank what it inherited: SIGTERM ends it; the others are its launcher's to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
