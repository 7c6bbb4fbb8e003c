"""Faults a person can act on, and the one place that turns them into a line and an exit status."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from alignment.runtime.bootstrap import is_debug
from alignment.runtime.termination import Stopped, is_stopping
from alignment.runtime.whereabouts import here
from data.errors import DataError

USAGE_STATUS = 2
RUN_STATUS = 1
INTERRUPT_STATUS = 130
STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
PIPE_STATUS = 141  # as the shell reports a process that SIGPIPE ended
PEER_GRACE_SECONDS = 20.0
_LOST_PEER_TEXT = re.compile(r"gloo/transport/|store/tcp_")  # the source file in the message of Paddle's C++ side


class UsageError(ValueError):
    """Bad input (argument, file, model directory): the run cannot start. Exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a key or a file's name may have several


class RunError(RuntimeError):
    """A fault while running (reward server down, reward not finite, self-check failed). Exit status 1."""


class LostPeer(RuntimeError):
    """Another process of the job has ended; the reason is that process's to tell."""


def run_main(main: Callable[[], object]) -> NoReturn:
    """Runs `main` and ends the process: 0, 2 for UsageError and DataError, 75 for Stopped, 1 for any other fault.

    A fault is one line `error: ...` on stderr, with the traceback before it if ALIGNMENT_DEBUG=1.
    """
    try:
        main()
        sys.stdout.flush()
        status = 0
    except SystemExit as end:  # --help and its like
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        _say("interrupted")
        status = INTERRUPT_STATUS
    except Stopped as reason:
        _say(f"stopped: {reason}")
        status = STOPPED_STATUS
    except (UsageError, DataError) as fault:
        status = _report(fault, str(fault), USAGE_STATUS)
        if process_number() > 0:  # rank 0 meets the same fault; stopped before it can say so, it would return SIGTERM
            _wait_for_launcher(status)
    except RunError as fault:
        status = _report(fault, str(fault), RUN_STATUS)
    except MemoryError as fault:
        status = _report(fault, "out of memory: use a smaller batch, shorter answers or a smaller model", RUN_STATUS)
    except Exception as fault:
        if isinstance(fault, BrokenPipeError) and _reader_has_left():
            _leave(PIPE_STATUS)
        if isinstance(fault, LostPeer) or (process_count() > 1 and _LOST_PEER_TEXT.search(str(fault))):
            here.lost = True  # the watch-dog may know whom
            _wait_for_launcher(RUN_STATUS)
        hint = "" if is_debug() else " (ALIGNMENT_DEBUG=1 shows the traceback)"
        status = _report(fault, f"{type(fault).__name__}: {fault}{hint}", RUN_STATUS)
    _leave(status)


def _report(fault: Exception, message: str, status: int) -> int:
    if is_debug():
        import traceback

        traceback.print_exception(fault)
    _say(f"error: {' '.join(message.split())}")
    return status


def _wait_for_launcher(status: int) -> None:
    """Gives the launcher time to stop this process, whose peer ended first.

    The launcher shows the log, and returns the status, of the lowest rank that failed: a rank that reports its lost
    connection at once would hide the message of the rank that knows the reason.
    """
    signal.signal(signal.SIGTERM, lambda *_: _leave(status))
    if not is_stopping():  # else the launcher has stopped it already
        time.sleep(PEER_GRACE_SECONDS)


def process_count() -> int:
    """How many processes the launcher started; 1 without it."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM") or 1)


def process_number() -> int:
    """This process's rank in the job; 0 without the launcher."""
    return int(os.environ.get("PADDLE_TRAINER_ID") or 0)


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def _reader_has_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more, such as that to a `head` that has seen enough."""
    try:
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in watched.poll(0))
    except (OSError, ValueError):  # no file: closed, or replaced by an object
        return False


def _leave(status: int) -> NoReturn:
    """Ends the process with `status`.

    Under the launcher at once: Python's normal exit would wait for communication threads while other ranks may sit in
    a collective, and their C++ destructors, run in any order, have been seen to abort a process that had finished.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # Python would try once more at its end, and complain
            status = status or PIPE_STATUS
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if process_count() > 1:
        os._exit(status)
    sys.exit(status)
