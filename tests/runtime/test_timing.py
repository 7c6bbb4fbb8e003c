"""Phases add up to the time they took together."""

from __future__ import annotations

import pytest

from alignment.runtime import timing
from alignment.runtime.timing import PhaseTimer


def test_a_phase_inside_another_counts_for_itself(monkeypatch):
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
