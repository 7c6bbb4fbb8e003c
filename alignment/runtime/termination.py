"""SIGTERM: a run that is told to end saves what it has done, and ends with a status of its own.

Schedulers send it before they kill. Paddle's launcher sends it to every process three times within half a second, so
a second one counts only when some time has passed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

BURST_SECONDS = 2.0
_SECOND_STATUS = 128 + signal.SIGTERM  # as a shell tells a signal


class Stopped(BaseException):
    """SIGTERM came, and what there was to save is saved; the message says how to go on. No Exception, as Ctrl-C."""


class _State:
    received: float | None = None
    postponed = False


def is_stopping() -> bool:
    """Whether SIGTERM has come to this process."""
    return _State.received is not None


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Within it, SIGTERM raises Stopped with ``message``, at once or, within ``postponed``, never: the code there asks
    ``is_stopping``. A second SIGTERM ends the process."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return

    def handle(*_: object) -> None:
        now = time.monotonic()
        if _State.received is None:
            _State.received = now
            if not _State.postponed:
                raise Stopped(message)
        elif now - _State.received > BURST_SECONDS:
            os._exit(_SECOND_STATUS)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if not is_stopping():  # else the rest of a burst would end the process before it has said why
            signal.signal(signal.SIGTERM, before)


@contextmanager
def postponed() -> Iterator[None]:
    """See ``stoppable``."""
    _State.postponed = True
    try:
        yield
    finally:
        _State.postponed = False
