"""A contender's side of the conversation with benchmarks.paired: JSON lines from stdin, answers to a pipe of its own.

Imported in every contender's environment, so only the standard library is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


class Requests:
    """The parent's requests; ``reply`` answers the last one.

    stdout belongs to whatever libraries print there: answers go to the descriptor that the command line names.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: a stopped process must not outlive its parent
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._channel = os.fdopen(int(sys.argv[1]), "w", buffering=1)

    def __iter__(self) -> Iterator[dict]:
        for line in sys.stdin:
            yield json.loads(line)

    def reply(self, **answer: object) -> None:
        self._channel.write(json.dumps(answer) + "\n")


def serve(handlers: dict[str, Callable[..., dict]], **hello: object) -> None:
    """Say hello, then answer each {"do": name, **arguments} by ``handlers[name](**arguments)``."""
    requests = Requests()
    requests.reply(**hello)
    for request in requests:
        requests.reply(**handlers[request.pop("do")](**request))


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of installed packages."""
    return {package: metadata.version(package) for package in packages}
