"""Seconds spent and memory used in each phase of an iteration."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from alignment.runtime.whereabouts import in_phase

_highest = 0.0  # GB, before the span that runs now
_last_mark = 0.0  # GB: the resident memory's high-water mark at the end of the span before


class PhaseTimer:
    """``with timer("rollout"): ...`` adds up seconds and keeps the peak memory; ``pop`` gives both and starts anew.

    A phase inside another counts for itself alone, so that phases add up to the time they took together. Timers know
    nothing of each other: what runs inside another timer's phase counts for both.
    """

    _running: ClassVar[list[tuple[PhaseTimer, str]]] = []  # the phases of all timers that run now, the innermost last

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._inside = 0.0  # seconds of the phases that have ended inside the present one
        self._peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._note_peak()
        self._running.append((self, phase))
        started, before, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            with in_phase(phase):
                yield
        finally:
            seconds = time.perf_counter() - started
            self._seconds[phase] += seconds - self._inside
            self._inside = before + seconds
            self._note_peak()
            self._running.pop()

    def _note_peak(self) -> None:
        """Count the memory since the last call for each timer's innermost phase; call it where one begins or ends."""
        peak = end_memory_span()
        if peak is None:
            return
        for timer, phase in dict(self._running).items():  # of a timer's phases the last is kept
            timer._peaks[phase] = max(peak, timer._peaks.get(phase, 0.0))

    def pop(self) -> dict[str, float]:
        """{"timing_s/<phase>": seconds, "memory_gb/<phase>": peak}, as far as known, since the last call."""
        metrics = {f"timing_s/{phase}": value for phase, value in self._seconds.items()}
        metrics |= {f"memory_gb/{phase}": value for phase, value in self._peaks.items()}
        self._seconds.clear()
        self._peaks.clear()
        return metrics


def end_memory_span() -> float | None:
    """The most memory used since the last call, in GB (see ``peak_memory_gb``); None where it cannot be told.

    Where Linux does not let a process reset its high-water mark (some sandboxes), a peak below one of an earlier span
    goes unseen: the memory in use at the end stands for it.
    """
    global _highest, _last_mark
    if _on_gpu():
        import paddle

        peak = paddle.device.cuda.max_memory_allocated() / 1e9
        paddle.device.cuda.reset_max_memory_allocated()
    else:
        try:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            mark, resident = (int(fields[name].split()[0]) * 1024 / 1e9 for name in ("VmHWM", "VmRSS"))
        except (OSError, KeyError):
            return None
        peak = mark if mark > _last_mark else resident
        _last_mark = 0.0 if _reset_high_water_mark() else mark
    _highest = max(_highest, peak)
    return peak


def _reset_high_water_mark() -> bool:
    """Whether VmHWM starts anew from the memory in use."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_gb() -> float:
    """The most memory this process has used so far, in GB: of the GPU where it computes on one, else resident."""
    if _on_gpu():
        import paddle

        return max(_highest, paddle.device.cuda.max_memory_allocated() / 1e9)
    return max(_highest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def _on_gpu() -> bool:
    import paddle

    return paddle.device.get_device().startswith("gpu")
