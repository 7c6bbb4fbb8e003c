"""Where in the run this process is: for the messages of faults, and for what the watch-dog tells other processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Whereabouts:
    """What the main thread does; other threads only read it.

    step: as in metrics.jsonl, 0 before the first; phase: e.g. "rollout", "update".
    operation: the latest collective operation, "" before the first; members: the ranks that take part in it.
    meeting: how many operations there were; waits: for members of this one; lost: it failed, and the run is over.
    """

    step: int = 0
    phase: str = "start"
    operation: str = ""
    members: tuple[int, ...] = ()
    meeting: int = 0
    waits: bool = False
    lost: bool = False

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


here = Whereabouts()


@contextmanager
def in_phase(name: str) -> Iterator[None]:
    """Within it, this process is in that phase."""
    before, here.phase = here.phase, name
    try:
        yield
    finally:
        here.phase = before


@contextmanager
def waiting(operation: str, members: Sequence[int]) -> Iterator[None]:
    """Within it, this process waits for these ranks to come to an operation."""
    here.operation, here.members, here.meeting = operation, tuple(members), here.meeting + 1
    here.waits = True
    try:
        yield
    finally:
        here.waits = False
