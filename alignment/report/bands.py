"""Curves of several runs that differ in the seed, and the frontier of reward against KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from alignment.report.reading import Stage
from alignment.report.style import MARKERS, RUNS, Picture, finish, new_axes

KL = "eval/kl_mean"
FRONTIERS = {  # key: title, metric of the height
    "frontier": ("Reward against KL", "eval/reward_mean"),
    "judge_frontier": ("Judge's reward against KL", "eval/judge_reward_mean"),
}
LEGEND_UP_TO = 4  # lines; the page has a legend of its own


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error float64 [P] of float [runs, P] over the runs; the error is 0 for a single one."""
    if len(values) < 2:
        return values.mean(0), np.zeros(values.shape[1])
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))


def draw_band(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str, marker: str = "o") -> None:
    """The mean line of float [runs, P], and a band of ± standard error where there are several runs."""
    mean, error = mean_and_error(values)
    shown = marker if len(steps) <= 30 else None
    axes.plot(steps, mean, color=color, marker=shown, markersize=4, linewidth=1.8, label=label, zorder=3)
    if len(values) > 1:
        axes.fill_between(steps, mean - error, mean + error, color=color, alpha=0.18, linewidth=0)


def draw_frontier(axes: Axes, kl: np.ndarray, reward: np.ndarray, label: str, color: str, marker: str = "o") -> None:
    """The mean points of float [runs, P] in the order of steps, with standard errors both ways, and each run's own.

    The last point is larger.
    """
    (x, x_error), (y, y_error) = mean_and_error(kl), mean_and_error(reward)
    several = len(kl) > 1
    axes.errorbar(
        x, y, y_error if several else None, x_error if several else None, color=color, marker=marker, markersize=4,
        linewidth=1.6, capsize=2, label=label, zorder=3,
    )  # fmt: skip
    axes.plot(x[-1:], y[-1:], marker, color=color, markersize=8, zorder=4)
    if several:
        axes.scatter(kl, reward, s=8, color=color, alpha=0.4, linewidths=0)


def leading(stages: Sequence[Stage]) -> list[Stage]:
    """The runs that have got furthest: means over runs that are still on their way would mix steps."""
    furthest = max(stage.last_step for stage in stages)
    return [stage for stage in stages if stage.last_step == furthest]


def common_series(stages: Sequence[Stage], *names: str) -> tuple[np.ndarray, ...]:
    """Steps int64 [P] at which every run has all metrics, and the values float64 [runs, P] of each metric."""
    known = [set(stage.metrics.get(name, {})) for stage in stages for name in names]
    steps = sorted(set.intersection(*known))
    values = (
        np.array([[stage.metrics[name][step] for step in steps] for stage in stages]).reshape(len(stages), len(steps))
        for name in names
    )
    return np.array(steps, dtype=np.int64), *values


def draw_frontiers(groups: Mapping[str, Sequence[Stage]]) -> list[Picture]:
    """Held-out reward, and the judge's, against KL. Args: groups: label: runs that differ in the seed."""
    pictures = []
    for key, (title, metric) in FRONTIERS.items():
        axes, told = new_axes(title, "KL to the reference, nats per answer", "reward"), []
        for place, (label, stages) in enumerate(groups.items()):
            steps, kl, reward = common_series(leading(stages), KL, metric)
            if len(steps) > 1:
                draw_frontier(axes, kl, reward, label, color_of(place), marker_of(place))
                told.append(f"{label} ends with {reward[:, -1].mean():.3g} at {kl[:, -1].mean():.3g} nats".strip())
        if told:
            if len(groups) == 1:
                _name_steps(axes, steps, kl.mean(0), reward.mean(0))
            show_legend(axes, len(told), always=True)
            pictures.append(finish(axes, key, "; ".join(told)))
    return pictures


def _name_steps(axes: Axes, steps: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    for place in sorted({0, len(steps) // 2, len(steps) - 1}):
        where = {"textcoords": "offset points", "xytext": (6, 6), "fontsize": 8, "color": "#5f6368"}
        axes.annotate(f"step {steps[place]}", (x[place], y[place]), **where)
    axes.margins(0.1, 0.12)


def show_legend(axes: Axes, lines: int, always: bool = False) -> None:
    """Below the plot, where there are several lines; of many only if it is shown ``always``."""
    if lines > 1 and (always or lines <= LEGEND_UP_TO):
        axes.figure.legend(loc="outside lower center", ncols=2 if lines < 5 else 3, fontsize=8)


def color_of(place: int) -> str:
    """The colour of a group of runs in every plot."""
    return RUNS[place % len(RUNS)]


def marker_of(place: int) -> str:
    return MARKERS[place % len(MARKERS)]
