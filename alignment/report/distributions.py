"""How the rewards and lengths of held-out answers are distributed, and how that changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from alignment.report.answers import answers_at, choose_steps
from alignment.report.bands import color_of, leading
from alignment.report.reading import Stage, finite
from alignment.report.style import HEIGHT, NEUTRAL, Picture, finish, new_axes
from alignment.report.tables import number

QUANTITIES = {"reward": "reward", "length": "tokens"}  # of a row of samples.jsonl: its unit
MOST_STEPS, BINS = 3, 20


def numbers_at(samples: Iterable[Mapping[str, Any]], step: int, name: str) -> np.ndarray:
    """float64 [n]: a quantity of the answers of a step, where it is a finite number."""
    values = (finite(row.get(name)) for row in answers_at(samples, step).values())
    return np.array([value for value in values if value is not None], dtype=np.float64)


def draw_histograms(samples: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Of a single run: a few steps over each other, from light to dark."""
    pictures, steps = [], choose_steps([row["step"] for row in samples], MOST_STEPS)
    shades = matplotlib.colormaps["Blues"](np.linspace(0.35, 0.95, max(len(steps), 2)))
    for name, unit in QUANTITIES.items():
        values = {step: found for step in steps if len(found := numbers_at(samples, step, name)) > 1}
        if not values:
            continue
        everything = np.concatenate(list(values.values()))
        edges = np.histogram_bin_edges(everything, BINS)
        axes = new_axes(f"Distribution of the {name}, held-out answers", unit, "answers")
        for place, (step, found) in enumerate(values.items()):
            color = shades[steps.index(step)]
            axes.hist(found, edges, histtype="stepfilled", color=color, alpha=0.2)
            axes.hist(found, edges, histtype="step", color=color, linewidth=1.8)
            label = f"step {step}, median {number(np.median(found))}"
            axes.axvline(np.median(found), color=color, linestyle="--", linewidth=1.4, label=label, zorder=3 + place)
        axes.legend(loc="best", fontsize=8)
        told = (f"median {number(np.median(found))} at step {step}" for step, found in values.items())
        pictures.append(finish(axes, f"{name}_distribution", ", ".join(told)))
    return pictures


def draw_boxes(groups: Mapping[str, Sequence[Stage]], unit: str) -> list[Picture]:
    """Of several groups of runs: each one's first and last answers as boxes. Args: unit: what steps are called."""
    pictures = []
    for name, quantity in QUANTITIES.items():
        rows, told = [], []
        for place, (label, stages) in enumerate(groups.items()):
            first, last = (_over_runs(stages, name, edge) for edge in (min, max))
            if len(first) and len(last):
                rows.append((label, first, last, color_of(place)))
                told.append(f"{label}: median {number(np.median(first))}, then {number(np.median(last))}")
        if not rows:
            continue
        height = max(HEIGHT, 1.0 + 0.5 * len(rows))
        axes = new_axes(f"Distribution of the {name}: first (grey) and last {unit}", quantity, "", height)
        for place, (_, *pair, color) in enumerate(rows):
            for offset, values, face in ((0.19, pair[0], NEUTRAL), (-0.19, pair[1], color)):
                _draw_box(axes, values, len(rows) - 1 - place + offset, face)
        axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)], fontsize=8)
        axes.grid(axis="y", visible=False)
        pictures.append(finish(axes, f"{name}_distribution", "; ".join(told)))
    return pictures


def _over_runs(stages: Sequence[Stage], name: str, edge: Callable[..., int]) -> np.ndarray:
    """A quantity of all answers at each run's own first or last step. Args: edge: min or max."""
    found = [
        numbers_at(stage.samples, edge(row["step"] for row in stage.samples), name)
        for stage in leading(stages)
        if stage.samples
    ]
    return np.concatenate(found) if found else np.zeros(0)


def _draw_box(axes: Axes, values: np.ndarray, height: float, color: str) -> None:
    line = {"color": color, "linewidth": 1.4}
    axes.boxplot(
        values, positions=[height], widths=0.3, orientation="horizontal", patch_artist=True, manage_ticks=False,
        boxprops={"facecolor": color, "alpha": 0.35, "edgecolor": color}, medianprops={**line, "linewidth": 2.2},
        whiskerprops=line, capprops=line, flierprops={"marker": ".", "markersize": 3, "markeredgecolor": color},
    )  # fmt: skip
