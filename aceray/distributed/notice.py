"""What SIGTERM asks for: let the present step end, keep a checkpoint of it, then end.

Schedulers send it some time before they kill. A signal is for a whole process, and so is what this module knows. It
knows no Ray.
"""

import _thread
import contextlib
import signal
import threading
from collections.abc import Iterator

# How long a step may take to end; then the run ends as by Ctrl-C, with its newest checkpoint. Docker kills after ten
# seconds, others later.
SECONDS_TO_END = 6.0

_given = threading.Event()
_heeding: list[object] = []


def give() -> None:
    """Make what heeds end after its present step."""
    _given.set()


def given() -> bool:
    """Whether what heeds must end now."""
    return _given.is_set()


def heeding() -> bool:
    """Whether somebody asks after every step."""
    return bool(_heeding)


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """In this context somebody asks `given` after every step, so a SIGTERM need not interrupt."""
    one = object()
    _heeding.append(one)
    try:
        yield
    finally:
        _heeding.remove(one)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """The first SIGTERM gives notice where that is heeded; elsewhere, and a second one, and a slow step, interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # does nothing when it comes after the context; os.kill would end the process then
    again = threading.Timer(SECONDS_TO_END, _thread.interrupt_main, (signal.SIGTERM,))
    again.daemon = True

    def end(number: int, frame: object) -> None:
        if not _heeding or given():
            raise KeyboardInterrupt(f"signal {number}")
        give()
        again.start()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        again.cancel()
        signal.signal(signal.SIGTERM, before)
        _given.clear()
