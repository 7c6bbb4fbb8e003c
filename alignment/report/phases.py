"""Where a run's time went, as seconds a step in each phase."""

from __future__ import annotations

from bisect import bisect_left

from alignment.report.reading import Stage

BETWEEN = ("evaluation", "saving")  # their rows have what they took since the row before; the other phases' one step

Phases = dict[str, dict[int, float]]


def seconds_per_step(stage: Stage) -> Phases:
    """{phase: {step: seconds a step}} at the steps whose row tells of training; empty where none does.

    Evaluation and saving are spread over the steps that the row stands for: those since such a row before.
    """
    phases = stage.phases("timing_s")
    measured = {phase: points for phase, points in phases.items() if phase not in BETWEEN}
    rows = sorted({step for points in measured.values() for step in points})
    for phase in BETWEEN if rows else ():
        for step, seconds in phases.get(phase, {}).items():
            place = min(bisect_left(rows, step), len(rows) - 1)
            steps = rows[place] - (rows[place - 1] if place else 0)
            points = measured.setdefault(phase, {})
            points[rows[place]] = points.get(rows[place], 0.0) + seconds / max(steps, 1)
    return measured


def mean_seconds(phases: Phases) -> dict[str, float]:
    """{phase: seconds a step, over the whole run}. Args: phases: of ``seconds_per_step``."""
    rows = {step for points in phases.values() for step in points}
    return {phase: sum(points.values()) / len(rows) for phase, points in phases.items()}


def shares(phases: Phases) -> dict[str, float]:
    """{phase: its part of the time that all took together}. Args: phases: of ``seconds_per_step``."""
    means = mean_seconds(phases)
    everything = sum(means.values()) or 1.0
    return {phase: seconds / everything for phase, seconds in means.items()}
