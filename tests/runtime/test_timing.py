"""Phases add up to the time they took together, and know the memory that was used in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alignment.runtime import timing
from alignment.runtime.timing import PhaseTimer, peak_memory_gb


def test_a_phase_inside_another_counts_for_itself(monkeypatch):
    monkeypatch.setattr(timing, "end_memory_span", lambda: None)
    clock = iter([0, 1, 3, 4, 8, 10, 10, 17])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    timer = PhaseTimer()
    with timer("score"):  # 0 to 10
        with timer("offload"):  # 1 to 3
            pass
        with pytest.raises(KeyError), timer("offload"):  # 4 to 8
            raise KeyError
    with timer("update"):  # 10 to 17
        pass
    assert timer.pop() == {"timing_s/score": 4.0, "timing_s/offload": 6.0, "timing_s/update": 7.0}
    assert timer.pop() == {}


def use_memory(megabytes: int) -> None:
    np.ones(megabytes * 1_000_000 // 8)  # far over the size from which memory goes back to the system at once


def run_phases() -> dict[str, float]:
    """An outer phase that uses 400 MB, one inside it with 200, and then one with next to nothing."""
    timer = PhaseTimer()
    with timer("score"):
        with timer("offload"):
            use_memory(200)
        use_memory(400)
    with timer("update"):
        use_memory(1)
    return {name: value for name, value in timer.pop().items() if name.startswith("memory_gb/")}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_each_phase_has_its_own_peak():
    timing.end_memory_span()  # imports Paddle, which the process then holds
    use_memory(1000)  # before all of them: the mark that Linux keeps is already higher
    found = run_phases()
    base = found["memory_gb/update"]
    assert found["memory_gb/offload"] - base == pytest.approx(0.2, abs=0.05)
    assert found["memory_gb/score"] - base == pytest.approx(0.4, abs=0.05)
    assert peak_memory_gb() - base > 0.9  # what all phases' marks do not hide


def test_without_resetting_the_mark_only_new_heights_are_seen(monkeypatch):
    monkeypatch.setattr(timing, "_reset_high_water_mark", lambda: False)
    timing.end_memory_span()
    low = run_phases()
    use_memory(1000)
    timing.end_memory_span()
    again = run_phases()
    assert again["memory_gb/score"] <= low["memory_gb/score"] + 0.05  # 400 MB, under the mark by now: unseen
    assert peak_memory_gb() >= again["memory_gb/score"] + 0.5


def test_memory_that_cannot_be_told_is_left_out(monkeypatch):
    monkeypatch.setattr(timing, "end_memory_span", lambda: None)
    assert run_phases() == {}
