"""Plots of several runs of one kind: a colour for each group of runs that differ in nothing but the seed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np

from alignment.report.bands import (
    color_of,
    common_series,
    draw_band,
    draw_frontiers,
    leading,
    marker_of,
    show_legend,
)
from alignment.report.distributions import draw_boxes
from alignment.report.panels import LEARNING_RATE, Panel, panels_of
from alignment.report.phases import BETWEEN, mean_seconds, seconds_per_step
from alignment.report.plots import SMOOTHED_FROM, mark_alerts, smooth, tell_series
from alignment.report.reading import Stage
from alignment.report.style import HEIGHT, NEUTRAL, STYLE, Picture, count_steps, finish, new_axes, phase_colors
from alignment.report.tables import number

Groups = Mapping[str, Sequence[Stage]]
LABEL_WIDTH = 26  # characters of a line beside a bar


def draw_comparison(groups: Groups) -> list[Picture]:
    """Every plot that the runs' metrics and samples allow. Args: groups: see alignment.report.groups.group_runs."""
    wrapped = {textwrap.fill(label, LABEL_WIDTH): stages for label, stages in groups.items()}
    unit = next(iter(groups.values()))[0].unit
    with matplotlib.rc_context(STYLE):
        curves = enumerate(_curves(groups))
        pictures = [_draw_panel(*curve, groups, unit, shows_legend=place == 0) for place, curve in curves]
        pictures += draw_frontiers(groups)
        pictures += draw_boxes(wrapped, unit)
        pictures += _draw_timing(wrapped, unit)
        pictures += _draw_memory(wrapped)
    return pictures


def _curves(groups: Groups) -> Iterator[tuple[Panel, str]]:
    """Each plot with its one metric: the held-out one if there is more of it than a point, else that of training."""
    stages = [stage for group in groups.values() for stage in group]
    panels = {panel.key: panel for stage in stages for panel in panels_of(stage)}
    for key, panel in panels.items():
        metrics = sorted((curve.metric for curve in panel.curves), key=lambda name: not name.startswith("eval/"))
        drawn = [name for name in metrics if any(len(stage.metrics.get(name, {})) > 1 for stage in stages)]
        if drawn and key not in (LEARNING_RATE.key, "components"):
            yield panel, drawn[0]


def _draw_panel(panel: Panel, metric: str, groups: Groups, unit: str, shows_legend: bool) -> Picture:
    """Mean lines with bands, each run thin behind its group's."""
    held_out, told = metric.startswith("eval/"), []
    axes = count_steps(new_axes(f"{panel.title}, {'held-out' if held_out else 'training'}", unit, panel.y_label))
    for place, (label, stages) in enumerate(groups.items()):
        color = color_of(place)
        steps, values = common_series(leading(stages), metric)
        if len(steps):
            smoothed = np.array([smooth(run) for run in values]) if _is_long(steps, held_out) else values
            draw_band(axes, steps, smoothed, label, color, marker_of(place))
            told.append(f"{label} {tell_series(steps, values.mean(0))}")
        for stage in stages if len(stages) > 1 or not len(steps) or _is_long(steps, held_out) else ():
            own_steps, own = stage.series(metric)
            thin = smooth(own) if len(stages) > 1 and _is_long(own_steps, held_out) else own
            axes.plot(own_steps, thin, color=color, linewidth=0.8, alpha=0.4)
        if alerts := [alert["step"] for stage in stages for alert in stage.alerts]:
            mark_alerts(axes, alerts, color, label=None)
    show_legend(axes, len(told), always=shows_legend)
    return finish(axes, panel.key, "; ".join(told))


def _is_long(steps: np.ndarray, held_out: bool) -> bool:
    return not held_out and len(steps) >= SMOOTHED_FROM


def _draw_timing(groups: Groups, unit: str) -> Iterator[Picture]:
    """Seconds a step by phase, one bar a group; what no phase accounts for is grey."""
    means = {
        label: _over_runs([mean_seconds(seconds_per_step(stage)) for stage in stages])
        for label, stages in groups.items()
    }
    means = {label: phases for label, phases in means.items() if phases}
    if not means:
        return
    axes = new_axes(f"Mean time of {'an' if unit == 'iteration' else 'a'} {unit}", "seconds", "", _height(means))
    colors = phase_colors(sorted({phase for phases in means.values() for phase in phases})) | {"other": NEUTRAL}
    for place, (label, phases) in enumerate(means.items()):
        between = sum(phases.get(phase, 0.0) for phase in BETWEEN)
        whole = max(_mean_of(groups[label], "perf/iteration_s") + between, sum(phases.values()))
        left = 0.0
        for phase, color in colors.items():
            seconds = whole - sum(phases.values()) if phase == "other" else phases.get(phase, 0.0)
            bar = axes.barh(len(means) - 1 - place, seconds, 0.7, left, color=color, label="" if place else phase)
            if seconds > 0.07 * whole:
                axes.bar_label(bar, [f"{seconds / whole:.0%}"], label_type="center", fontsize=8, color="white")
            left += seconds
    _label_bars(axes, means)
    told = (f"{label}: {number(sum(phases.values()))} s" for label, phases in means.items())
    yield finish(axes, "timing", "; ".join(told))


def _draw_memory(groups: Groups) -> Iterator[Picture]:
    """The highest peak of each phase, one row a group."""
    peaks = {label: _over_runs([_peaks(stage) for stage in stages]) for label, stages in groups.items()}
    peaks = {label: phases for label, phases in peaks.items() if phases}
    if not peaks:
        return
    axes = new_axes("Peak memory by phase", "GB", "", _height(peaks))
    for phase, color in phase_colors(sorted({phase for phases in peaks.values() for phase in phases})).items():
        points = [
            (phases[phase], len(peaks) - 1 - place) for place, phases in enumerate(peaks.values()) if phase in phases
        ]
        axes.plot(*zip(*points, strict=True), "o", color=color, markersize=8, alpha=0.85, label=phase)
    axes.set_xlim(left=0)
    _label_bars(axes, peaks)
    told = (f"{label}: up to {number(max(phases.values()))} GB" for label, phases in peaks.items())
    yield finish(axes, "memory", "; ".join(told))


def _peaks(stage: Stage) -> dict[str, float]:
    return {phase: max(points.values()) for phase, points in stage.phases("memory_gb").items()}


def _over_runs(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """{phase: the mean over the runs that know it}."""
    names = dict.fromkeys(phase for run in runs for phase in run)
    return {phase: float(np.mean([run[phase] for run in runs if phase in run])) for phase in names}


def _mean_of(stages: Sequence[Stage], metric: str) -> float:
    values = [value for stage in stages for value in stage.metrics.get(metric, {}).values()]
    return float(np.mean(values)) if values else 0.0


def _height(groups: Mapping) -> float:
    return max(HEIGHT, 1.2 + 0.42 * len(groups))


def _label_bars(axes, groups: Mapping) -> None:
    axes.set_yticks(range(len(groups)), list(reversed(groups)), fontsize=8)
    axes.set_ylim(-0.7, len(groups) - 0.3)
    axes.grid(axis="y", visible=False)
    axes.figure.legend(loc="outside lower center", ncols=6, fontsize=8)
