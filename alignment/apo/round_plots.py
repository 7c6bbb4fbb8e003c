"""Plots of a game: test score and win rate over its rounds, and what its reward models' held-out scores are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignment.report.style import EXTRA, HELD_OUT, STYLE, THIRD, TRAIN
from alignment.rm.plots import COLORS
from alignment.runtime.files import whole

LINES = (TRAIN, HELD_OUT, THIRD, *EXTRA)
NEUTRAL = "#9aa0a6"


def draw_game(directory: Path, numbers: Mapping[str, Any], calibrations: Mapping[str, Mapping[str, Any]]) -> None:
    """Write rounds.png, score_distributions.png and reliability.png.

    Args: numbers: of rounds.json; calibrations: by name of a reward model, its calibration.json.
    """
    chosen = numbers.get("testing_reward_model", {}).get("scores", {}).get("chosen", {}).get("mean")
    draw_rounds(directory / "rounds.png", {"policy": numbers["rounds"]}, chosen)
    with matplotlib.rc_context(STYLE):
        if calibrations:
            _draw_scores(directory / "score_distributions.png", calibrations)
            _draw_reliability(directory / "reliability.png", calibrations)


def draw_rounds(path: Path, games: Mapping[str, Sequence[Mapping[str, Any]]], chosen: float | None = None) -> None:
    """Test score (± standard error) and win rate (95 % interval) over rounds.

    Args: games: the rounds of rounds.json, by the game's name; chosen: the mean score of people's preferred answers.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, ((name, rows), color) in enumerate(zip(games.items(), LINES, strict=False)):
            at = np.array([row["round"] for row in rows]) + 0.04 * place  # error bars beside each other
            scores, wins = ([row[key] for row in rows] for key in ("test_score", "win_rate"))
            spread = [score["standard_error"] for score in scores]
            _draw_line(left, at, [score["mean"] for score in scores], spread, color, name)
            means = [win["mean"] for win in wins]
            reach = [[win["mean"] - win["low"] for win in wins], [win["high"] - win["mean"] for win in wins]]
            _draw_line(right, at[1:], means[1:], [side[1:] for side in reach], color, name)
        if chosen is not None:
            left.axhline(chosen, color=NEUTRAL, linestyle="--", linewidth=1.2, label="people's preferred answers")
        right.axhline(0.5, color=NEUTRAL, linestyle="--", linewidth=1.2, label="the start")
        left.set(title="Score by the testing reward model", xlabel="round", ylabel="mean ± standard error")
        right.set(title="Win rate against the start", xlabel="round", ylabel="share, 95 % interval")
        right.set_ylim(-0.02, 1.02)
        rounds = sorted({row["round"] for rows in games.values() for row in rows})
        for axes in (left, right):
            axes.set_xticks(rounds)
            axes.set_xlim(rounds[0] - 0.3, rounds[-1] + 0.3)
            axes.legend(loc="best")
        _save(figure, path)


def _draw_line(axes: Axes, at: Any, means: Any, errors: Any, color: str, name: str) -> None:
    axes.errorbar(at, means, errors, color=color, marker="o", markersize=5, linewidth=1.6, capsize=4, label=name)


def _draw_scores(path: Path, calibrations: Mapping[str, Mapping[str, Any]]) -> None:
    """The distributions of each reward model's held-out scores by role, each of area 1, means dashed."""
    figure = Figure(figsize=(6.8, 0.6 + 2.2 * len(calibrations)), layout="constrained")
    for axes, (name, numbers) in zip(
        figure.subplots(len(calibrations), 1, squeeze=False)[:, 0], calibrations.items(), strict=True
    ):
        for role, values in numbers["scores"].items():
            edges, counts = np.array(values["edges"]), np.array(values["histogram"])
            heights = counts / counts.sum() / np.diff(edges)
            label = f"{role}: {values['mean']:.2f} ± {values['std']:.2f}"
            axes.stairs(heights, edges, color=COLORS[role], linewidth=1.6, label=label)
            axes.axvline(values["mean"], color=COLORS[role], linewidth=1.1, linestyle="--")
        axes.set(title=f"Held-out scores, reward model: {name}", ylabel="density")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xlabel("score (mean ± deviation in the legend)")
    _save(figure, path)


def _draw_reliability(path: Path, calibrations: Mapping[str, Mapping[str, Any]]) -> None:
    """Share of wins over predicted probability, a line a reward model, both orders of people's held-out pairs."""
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle="--", label="perfectly calibrated")
    for (name, numbers), color in zip(calibrations.items(), LINES, strict=False):
        curve = numbers["reliability"]["both_orders"]
        count, predicted, observed = (np.array(curve[key]) for key in ("count", "predicted", "observed"))
        filled = count > 0
        x, y = predicted[filled] / count[filled], observed[filled] / count[filled]
        axes.plot(x, y, color=color, linewidth=1.4, label=f"{name}, ECE {curve['ece']:.3f}")
        axes.scatter(x, y, 10 + 300 * count[filled] / count.sum(), color, zorder=3)
    axes.set(title="Reliability", xlabel="predicted probability that the first answer wins", ylabel="share of wins")
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    axes.legend(loc="upper left")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})
