"""Keeps other processes out of a directory while one is at work there."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from alignment.runtime.console import say
from alignment.runtime.faults import UsageError


def lock(path: Path) -> IO[str]:
    """Take the lock that is the file ``path``; it is given back when the file is closed, or its last holder has ended.

    Raises: UsageError if another process has it; OSError if the file cannot be made.
    """
    file = path.open("a")  # not "w": a run that has nothing left to do changes no file's time
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(f'"output_dir": another process is at work in {path.parent}; wait for its end') from None
    except OSError as fault:
        say(f"notice: {path.parent} is on a file system without locks ({fault.strerror}): run no other process there")
    return file
