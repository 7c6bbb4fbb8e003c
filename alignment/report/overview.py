"""The tables over several runs: all at a glance, and groups of seeds with their means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignment.report.bands import leading, mean_and_error
from alignment.report.groups import describe_layout
from alignment.report.reading import STAGE_TITLES, Stage
from alignment.report.tables import ERRORS, HEADLINES, NOT_AVAILABLE, number, with_error

METRICS = {  # column: metric whose last value it shows
    "Held-out reward": "eval/reward_mean",
    "Judge's reward": "eval/judge_reward_mean",
    "Win rate": "eval/win_rate",
    "KL, nats": "eval/kl_mean",
    "Held-out accuracy": "eval/accuracy",
    "Held-out loss": "eval/loss",
}
OBJECTIVES = ("policy_loss", "policy_update")


def anchors(stages: Sequence[Stage]) -> list[str]:
    """A name for each run that can stand in a link and in a file's name."""
    names: list[str] = []
    for stage in stages:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", stage.name or stage.directory.resolve().name)
        names.append(f"{name}_{len(names)}" if name in names else name)
    return names


def overview(stages: Sequence[Stage]) -> list[dict[str, str]]:
    """{column: cell} of each run; columns that no run has anything for are left out."""
    rows = [_describe(stage) for stage in stages]
    used = [column for column in rows[0] if any(row[column] for row in rows)]
    return [{column: row[column] for column in used} for row in rows]


def _describe(stage: Stage) -> dict[str, str]:
    return {
        "Stage": STAGE_TITLES[stage.kind],
        "Objective": next((str(stage.arguments[key]) for key in OBJECTIVES if stage.arguments.get(key)), ""),
        "Seed": str(stage.arguments.get("seed", "")),
        "Layout": describe_layout(stage.run["topology"]) if isinstance(stage.run.get("topology"), dict) else "",
        "Steps": _count_steps(stage),
        "Time": duration(training_seconds(stage)),
        "Alerts": str(len(stage.alerts) or ""),
        **{column: _last(stage, metric) for column, metric in METRICS.items()},
    }


def _count_steps(stage: Stage) -> str:
    """Done, and of how many where the arguments say so."""
    planned = stage.arguments.get("max_steps")
    of_all = f" of {planned}" if isinstance(planned, int) and planned > stage.last_step else ""
    return f"{stage.last_step}{of_all}"


def _last(stage: Stage, metric: str) -> str:
    value, error = stage.final(metric), stage.final(ERRORS.get(metric, ""))
    if value is None:
        return ""
    return number(value) if error is None else with_error(value, error)


def training_seconds(stage: Stage) -> float | None:
    """Of all steps, those between two lines of metrics.jsonl counted like the ones that have a line."""
    steps, seconds = stage.series("perf/iteration_s")
    return float(seconds.mean() * stage.last_step) if len(steps) else None


def duration(seconds: float | None) -> str:
    """As people say it: 45 s, 3 min, 2 h 05 min."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def compare_groups(kind: str, groups: Mapping[str, Sequence[Stage]]) -> dict[str, Any]:
    """{"columns", "rows": [{"label", "runs", "cells"}]}: last values, mean ± standard error over a group's runs.

    A single run's standard error is over its prompts, where it is known. Runs that are behind others of their group
    do not count.
    """
    stages = [stage for group in groups.values() for stage in group]
    names = [name for name in HEADLINES[kind] if any(stage.final(name) is not None for stage in stages)]
    rows = [
        {"label": label, "runs": _count_runs(group), "cells": [_over_runs(leading(group), name) for name in names]}
        for label, group in groups.items()
    ]
    return {"columns": [HEADLINES[kind][name] for name in names], "rows": rows}


def _over_runs(stages: Sequence[Stage], metric: str) -> str:
    if len(stages) == 1:
        return _last(stages[0], metric) or NOT_AVAILABLE
    values = [value for stage in stages if (value := stage.final(metric)) is not None]
    if len(values) < 2:
        return NOT_AVAILABLE
    (mean,), (error,) = mean_and_error(np.array(values)[:, None])
    return with_error(mean, error)


def _count_runs(stages: Sequence[Stage]) -> str:
    counted = len(leading(stages))
    return str(counted) if counted == len(stages) else f"{counted} of {len(stages)}"
