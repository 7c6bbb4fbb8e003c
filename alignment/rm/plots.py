"""Pictures of a reward model's held-out scores, with their numbers: reliability diagram and score distributions."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from alignment.report.style import EXTRA, HELD_OUT, STYLE, THIRD, TRAIN
from alignment.rm.evaluation import Arrays, describe_curve, one_order_curve, peoples_pairs, scores_by_role
from alignment.rm.metrics import Calibration, calibration_curve, standard_errors
from alignment.runtime.files import write_bytes, write_text

RELIABILITY, SCORES, NUMBERS = "reliability.png", "scores.png", "calibration.json"
COLORS = {"chosen": TRAIN, "rejected": HELD_OUT, "golden": THIRD, "sample": EXTRA[0]}
MOST_BINS = 40


def write_pictures(rows: Arrays, directory: Path, temperature: float | None = None) -> None:
    """Write the three files into ``directory``, each at once.

    Args: rows: see alignment.rm.evaluation.held_out_metrics; temperature: what calibrated scores are divided by.
    """
    pairs = peoples_pairs(rows)
    curves = reliability_curves(pairs, temperature)
    scores = scores_by_role(rows)
    numbers = {
        "pairs": len(pairs["better"]),
        "temperature": temperature,
        "reliability": {name: describe_curve(curve) for name, curve in curves.items()},
        "standard_errors": standard_errors((pairs["better"] - pairs["worse"]) / (temperature or 1.0)),
        "scores": describe_scores(scores),
    }
    with matplotlib.rc_context(STYLE):
        write_bytes(directory / RELIABILITY, draw_reliability(curves))
        write_bytes(directory / SCORES, draw_scores(scores))
    write_text(directory / NUMBERS, json.dumps(numbers, indent=2) + "\n")


def reliability_curves(pairs: Arrays, temperature: float | None) -> dict[str, Calibration]:
    """By name: pairs in both orders and in one; with a temperature, in both orders once more, divided by it."""
    margins = (pairs["better"] - pairs["worse"]).astype(np.float64)
    wins = np.ones_like(margins)
    curves = {"both_orders": calibration_curve(margins, wins), "one_order": one_order_curve(pairs)}
    if temperature is not None:
        curves["calibrated"] = calibration_curve(margins / temperature, wins)
    return curves


def describe_scores(scores: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """By role: count, mean, deviation, quartiles, and a histogram over edges that all roles share."""
    edges = _edges(scores)
    return {
        role: {
            "count": len(values),
            "mean": float(values.mean()),
            "std": float(values.std()),
            "quartiles": np.quantile(values, (0.25, 0.5, 0.75)).tolist(),
            "edges": edges.tolist(),
            "histogram": np.histogram(values, edges)[0].tolist(),
        }
        for role, values in scores.items()
    }


def draw_reliability(curves: Mapping[str, Calibration]) -> bytes:
    """PNG: share of wins over mean predicted probability, a point a bin; below, the pairs of each bin."""
    figure = Figure(figsize=(5.2, 5.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="#9aa0a6", linewidth=1, linestyle="--", label="perfectly calibrated")
    for (name, curve), color in zip(curves.items(), (TRAIN, HELD_OUT, THIRD), strict=False):
        filled = curve.count > 0
        ece = describe_curve(curve)["ece"]
        predicted, observed = (part[filled] / curve.count[filled] for part in (curve.predicted, curve.observed))
        label = f"{name.replace('_', ' ')}, ECE {ece:.3f}"
        upper.plot(predicted, observed, color=color, linewidth=1.4, label=label)
        upper.scatter(predicted, observed, 10 + 300 * curve.count[filled] / curve.count.sum(), color, zorder=3)
    bins = len(curves["both_orders"].count)
    centers, width = (np.arange(bins) + 0.5) / bins, 0.8 / bins / len(curves)
    for place, (curve, color) in enumerate(zip(curves.values(), (TRAIN, HELD_OUT, THIRD), strict=False)):
        shift = (place - (len(curves) - 1) / 2) * width
        lower.bar(centers + shift, curve.count / curve.count.sum(), width, color=color)
    upper.set(title="Reliability", ylabel="share of wins", xlim=(0, 1), ylim=(-0.02, 1.02))
    upper.legend(loc="upper left")
    lower.set(xlabel="predicted probability that the first answer wins", ylabel="share of pairs")
    return _png(figure)


def draw_scores(scores: Mapping[str, np.ndarray]) -> bytes:
    """PNG: the scores' distributions by role, each of area 1, with their means as dashed lines."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    edges = _edges(scores)
    for role, values in scores.items():
        heights = np.histogram(values, edges, density=True)[0]
        label = f"{role}: {values.mean():.2f} ± {values.std():.2f}"
        axes.stairs(heights, edges, fill=True, color=COLORS[role], alpha=0.15)
        axes.stairs(heights, edges, color=COLORS[role], linewidth=1.6, label=label)
        axes.axvline(values.mean(), color=COLORS[role], linewidth=1.2, linestyle="--")
    axes.set(title="Held-out scores", xlabel="score (mean ± deviation in the legend)", ylabel="density")
    axes.legend(loc="best")
    return _png(figure)


def _edges(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    values = np.concatenate(list(scores.values()))
    return np.histogram_bin_edges(values, min(MOST_BINS, 1 + int(len(values) ** 0.5)))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
