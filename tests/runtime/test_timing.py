"""Phases add up to the time they took together, and know the memory that was used in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.runtime import timing
from alignment.runtime.timing import PhaseTimer


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


def test_what_runs_inside_another_timers_phase_counts_for_both(monkeypatch):
    monkeypatch.setattr(timing, "end_memory_span", lambda: None)
    clock = iter([0, 1, 4, 7])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    loop, timer = PhaseTimer(), PhaseTimer()
    with loop("evaluation"), timer("rollout"):  # 0 to 7, 1 to 4
        pass
    assert (loop.pop(), timer.pop()) == ({"timing_s/evaluation": 7.0}, {"timing_s/rollout": 3.0})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_each_phase_has_its_own_peak():
    command = [sys.executable, "-m", "tests.runtime.memory_phases"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    base = found["reset"]["memory_gb/update"]
    assert found["reset"]["memory_gb/offload"] - base == pytest.approx(0.2, abs=0.05)
    assert found["reset"]["memory_gb/score"] - base == pytest.approx(0.4, abs=0.05)
    assert found["reset"]["memory_gb/evaluation"] == found["reset"]["memory_gb/score"]  # of both timers' phases
    assert found["reset"]["peak"] - base > 0.9  # what all phases' marks do not hide
    unseen = found["not reset"]  # 400 MB under a mark that stays
    assert unseen["memory_gb/score"] == pytest.approx(base, abs=0.05)
    assert unseen["peak"] - base > 1.4


def test_memory_that_cannot_be_told_is_left_out(monkeypatch):
    monkeypatch.setattr(timing, "end_memory_span", lambda: None)
    timer = PhaseTimer()
    with timer("score"):
        pass
    assert timer.pop().keys() == {"timing_s/score"}
