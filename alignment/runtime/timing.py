"""Seconds spent in each phase of an iteration."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from alignment.runtime.whereabouts import in_phase


class PhaseTimer:
    """``with timer("rollout"): ...`` adds up seconds; ``pop`` gives them as metrics and starts anew.

    A phase inside another counts for itself alone, so that phases add up to the time they took together.
    """

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._inside = 0.0  # seconds of the phases that have ended inside the present one

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started, before, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            with in_phase(phase):
                yield
        finally:
            seconds = time.perf_counter() - started
            self._seconds[phase] += seconds - self._inside
            self._inside = before + seconds

    def pop(self) -> dict[str, float]:
        """{"timing_s/<phase>": seconds} since the last call."""
        seconds = {f"timing_s/{phase}": value for phase, value in self._seconds.items()}
        self._seconds.clear()
        return seconds


def peak_memory_gb() -> float:
    """The most memory this process has used so far, in GB: of the GPU where it computes on one, else resident."""
    import paddle

    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
