"""Ctrl-C, remembered: what runs below may lose the KeyboardInterrupt, and a run must know all the same.

A library whose clean-up raises turns it into an error of its own (transformers' `no_init_weights` does, when it is
interrupted as it begins), and one that catches everything swallows it. Either would be recorded as the fault of the
check that happened to run.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_seen = 0


def interruptions() -> int:
    """How often SIGINT has arrived since this process began to remember it."""
    return _seen


def stop_if_interrupted(since: int) -> None:
    """Raise KeyboardInterrupt if SIGINT has arrived since `interruptions` was `since`."""
    if _seen > since:
        raise KeyboardInterrupt


def remember() -> None:
    """From now on count each SIGINT and raise KeyboardInterrupt as Python does.

    Leaves any other handler than Python's alone. Signals reach the main thread only: in any other there is nothing to
    count.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _count)


@contextmanager
def remembered() -> Iterator[None]:
    """`remember`, and Python's own handler again at the end."""
    before = signal.getsignal(signal.SIGINT)
    remember()
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _count:
            signal.signal(signal.SIGINT, before)


def _count(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen += 1
    signal.default_int_handler(number, frame)
