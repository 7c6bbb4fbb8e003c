"""One run's metrics as PNG images, one per subject."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from alignment.report.bands import draw_frontiers
from alignment.report.distributions import draw_histograms
from alignment.report.panels import LEARNING_RATE, Curve, Panel, panels_of
from alignment.report.phases import Phases, seconds_per_step, shares
from alignment.report.reading import Stage
from alignment.report.style import STYLE, Picture, count_steps, finish, new_axes, phase_colors
from alignment.report.tables import number

ALERT = "#b3261e"
SMOOTHED_FROM = 20  # points; below, every point is worth seeing
MOST_BARS = 40


def draw_stage(stage: Stage) -> list[Picture]:
    """Every plot the stage's metrics and samples allow."""
    with matplotlib.rc_context(STYLE):
        pictures = [_draw_panel(stage, panel) for panel in panels_of(stage)]
        pictures += draw_frontiers({"": [stage]})
        pictures += draw_histograms(stage.samples)
        if phases := seconds_per_step(stage):
            pictures.append(_draw_timing(phases, stage.unit))
        if stage.phases("memory_gb"):
            pictures.append(_draw_memory(stage))
    return pictures


def _draw_panel(stage: Stage, panel: Panel) -> Picture:
    axes = count_steps(new_axes(panel.title, stage.unit, panel.y_label))
    for curve in panel.curves:
        _draw_curve(axes, stage, curve)
    if panel is LEARNING_RATE:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(0, 0))
    if stage.alerts:
        mark_alerts(axes, [alert["step"] for alert in stage.alerts], ALERT)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="best")
    told = (f"{curve.label} {tell_series(*stage.series(curve.metric))}" for curve in panel.curves)
    return finish(axes, panel.key, "; ".join(text for text in told if not text.endswith(" ")))


def tell_series(steps: np.ndarray, values: np.ndarray) -> str:
    """A curve in words, empty for one without points."""
    if not len(steps):
        return ""
    return f"from {number(values[0])} at {steps[0]} to {number(values[-1])} at {steps[-1]}"


def mark_alerts(axes: Axes, steps: Sequence[int], color: str, label: str | None = "alert") -> None:
    """Triangles on the lower edge where something was reported."""
    place = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 4}
    axes.plot(steps, np.zeros(len(steps)), "^", color=color, markersize=6, linestyle="none", label=label, **place)


def _draw_curve(axes: Axes, stage: Stage, curve: Curve) -> None:
    steps, values = stage.series(curve.metric)
    if not len(steps):
        return
    if curve.metric.startswith("eval/"):
        known = stage.metrics.get(curve.errors or "", {})
        errors = np.array([known.get(step, 0.0) for step in steps.tolist()])
        label = f"{curve.label} (± standard error)" if errors.any() else curve.label
        axes.errorbar(
            steps, values, errors if errors.any() else None, color=curve.color, label=label,
            marker="o", markersize=5, linewidth=1.8, capsize=3, zorder=3,
        )  # fmt: skip
    elif len(steps) >= SMOOTHED_FROM and curve.metric != "lr":
        axes.plot(steps, values, color=curve.color, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth(values), color=curve.color, linewidth=1.8, label=f"{curve.label} (smoothed)")
    else:
        marker = "o" if len(steps) < SMOOTHED_FROM else None
        axes.plot(steps, values, color=curve.color, linewidth=1.8, marker=marker, markersize=3.5, label=curve.label)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average [n] over about a tenth of the run, so that nothing lags; cut off at the ends."""
    half = max(2, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _draw_timing(phases: Phases, unit: str) -> Picture:
    """Seconds a step, phases stacked; neighbouring steps are averaged where there are many."""
    steps = sorted({step for points in phases.values() for step in points})
    size = -(-len(steps) // MOST_BARS)
    bins = [np.array(steps[start : start + size]) for start in range(0, len(steps), size)]
    centers = np.array([group.mean() for group in bins])
    width = 0.85 * (float(np.diff(centers).min()) if len(centers) > 1 else 1.0)
    axes = count_steps(new_axes(f"Time per {unit}", unit, "seconds"))
    bottom, parts = np.zeros(len(bins)), shares(phases)
    for phase, color in phase_colors(list(phases)).items():
        points = phases[phase]
        heights = np.array([np.mean([points.get(step, 0.0) for step in group.tolist()]) for group in bins])
        axes.bar(centers, heights, width, bottom, color=color, label=f"{phase} {parts[phase]:.0%}")
        bottom += heights
    axes.grid(axis="x", visible=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return finish(axes, "timing", ", ".join(f"{phase} {part:.0%}" for phase, part in parts.items()))


def _draw_memory(stage: Stage) -> Picture:
    """The peak of each phase, iteration by iteration."""
    phases = stage.phases("memory_gb")
    axes = count_steps(new_axes("Peak memory by phase", stage.unit, "GB"))
    for phase, color in phase_colors(list(phases)).items():
        steps, values = stage.series(f"memory_gb/{phase}")
        marker = "o" if len(steps) < SMOOTHED_FROM else None
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=phase)
    highest = {phase: max(points.values()) for phase, points in phases.items()}
    axes.set_ylim(0, 1.1 * max(highest.values()) or 1)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return finish(axes, "memory", ", ".join(f"{phase} up to {number(peak)} GB" for phase, peak in highest.items()))
