"""A stage's metrics as PNG images, one per subject, all drawn in one style."""

from __future__ import annotations

import io
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignment.report.reading import Stage

TRAIN, HELD_OUT, THIRD = "#3b6fb6", "#d9772b", "#5b9a68"  # told apart also by colour-blind readers
EXTRA = ("#8d6cab", "#b5504f", "#6b7280", "#c29b2e")
PHASES = {
    "rollout": TRAIN,
    "score": HELD_OUT,
    "update": THIRD,
    "evaluate": EXTRA[0],
    "reshard": EXTRA[1],
    "offload": EXTRA[2],
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#3c4043",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#3c4043",
    "ytick.color": "#3c4043",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
SMOOTHED_FROM = 20  # points; below, every point is worth seeing
MOST_BARS = 40


@dataclass(frozen=True)
class Curve:
    """A metric to draw; `errors` names the metric that holds its standard error."""

    metric: str
    label: str
    color: str
    errors: str | None = None


@dataclass(frozen=True)
class Panel:
    """One plot: drawn if at least one of its curves has a point."""

    key: str
    title: str
    y_label: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Picture:
    """A drawn plot: `key` is its file name without .png, `png` its bytes."""

    key: str
    title: str
    png: bytes


def _pair(train: str, held_out: str, errors: str | None = None) -> tuple[Curve, ...]:
    return Curve(train, "training", TRAIN), Curve(held_out, "held-out", HELD_OUT, errors)


def _sides(name: str) -> tuple[Curve, ...]:
    return Curve(f"{name}/chosen", "chosen", THIRD), Curve(f"{name}/rejected", "rejected", EXTRA[1])


PANELS = {
    "ppo": (
        Panel("reward", "Reward", "reward", _pair("rollout/reward_mean", "eval/reward_mean", "eval/reward_sem")),
        Panel(
            "judge",
            "Judge's reward",
            "reward of a model not trained on",
            (Curve("eval/judge_reward_mean", "held-out", HELD_OUT, "eval/judge_reward_sem"),),
        ),
        Panel(
            "win_rate",
            "Win rate against the initial policy",
            "share of prompts",
            (Curve("eval/win_rate", "held-out", HELD_OUT, "eval/win_rate_sem"),),
        ),
        Panel("kl", "KL to the reference", "nats per answer", _pair("objective/kl", "eval/kl_mean")),
        Panel("length", "Answer length", "tokens", _pair("rollout/length_mean", "eval/length_mean")),
        Panel("truncated", "Truncated answers", "share", _pair("rollout/truncated_rate", "eval/truncated_rate")),
        Panel("policy_loss", "Policy loss", "loss", (Curve("loss/policy_avg", "policy", TRAIN),)),
        Panel("value_loss", "Value loss", "loss", (Curve("loss/value_avg", "value", TRAIN),)),
        Panel("ptx_loss", "Loss on pre-training data", "nats per token", (Curve("loss/ptx_avg", "ptx", TRAIN),)),
        Panel("entropy", "Entropy of the policy", "nats per token", (Curve("policy/entropy_avg", "policy", TRAIN),)),
    ),
    "offline": (
        Panel("reward", "Reward", "reward", (Curve("eval/reward_mean", "held-out", HELD_OUT, "eval/reward_sem"),)),
        Panel("kl", "KL to the reference", "nats per answer", (Curve("eval/kl_mean", "held-out", HELD_OUT),)),
        Panel("length", "Answer length", "tokens", (Curve("eval/length_mean", "held-out", HELD_OUT),)),
        Panel("policy_loss", "Policy loss", "loss", _pair("loss/policy_avg", "eval/loss")),
        Panel("value_loss", "Value loss", "loss", _pair("loss/value_avg", "eval/value_loss")),
        Panel("entropy", "Entropy of the policy", "nats per token", (Curve("policy/entropy_avg", "policy", TRAIN),)),
    ),
    "rm": (
        Panel("loss", "Ranking loss", "loss", _pair("loss", "eval/loss")),
        Panel("accuracy", "Accuracy on pairs", "share ranked right", _pair("accuracy", "eval/accuracy")),
        Panel("margin", "Margin better - worse", "reward", _pair("margin", "eval/margin")),
    ),
    "sft": (Panel("loss", "Loss", "nats per token", _pair("loss", "eval/loss")),),
    "update": (
        Panel("loss", "Loss", "loss", _pair("loss", "eval/loss")),
        Panel("accuracy", "Accuracy on pairs", "share ranked right", _pair("accuracy", "eval/accuracy")),
        Panel("margin", "Margin chosen - rejected", "implicit reward", _pair("rewards/margin", "eval/rewards/margin")),
        Panel("rewards", "Held-out implicit rewards", "reward", _sides("eval/rewards")),
        Panel("logps", "Held-out log-probabilities of answers", "nats (rrhf: per token)", _sides("eval/logps")),
        Panel("log_ratio", "Log-ratio to the initial policy", "nats per answer", _pair("log_ratio", "eval/log_ratio")),
        Panel("rank_loss", "Ranking term", "loss", _pair("rank_loss", "eval/rank_loss")),
        Panel("sft_loss", "Best answer's cross-entropy", "nats per token", _pair("sft_loss", "eval/sft_loss")),
    ),
}
LEARNING_RATE = Panel("lr", "Learning rate", "learning rate", (Curve("lr", "lr", TRAIN),))


def draw_stage(stage: Stage) -> list[Picture]:
    """Every plot the stage's metrics allow."""
    components = [] if stage.kind == "update" else [_component_panel(stage)]  # whose rewards/ are implicit ones
    panels = [*PANELS[stage.kind], *components, LEARNING_RATE]
    with matplotlib.rc_context(STYLE):
        pictures = [
            _draw_panel(stage, panel) for panel in panels if any(c.metric in stage.metrics for c in panel.curves)
        ]
        if any(name.startswith("timing_s/") for name in stage.metrics):
            pictures.append(_draw_timing(stage))
    return pictures


def _component_panel(stage: Stage) -> Panel:
    """The parts of a weighted sum of rewards."""
    names = sorted(name for name in stage.metrics if name.startswith("rewards/"))
    colors = (TRAIN, HELD_OUT, THIRD, *EXTRA)
    curves = tuple(Curve(n, n.removeprefix("rewards/"), colors[i % len(colors)]) for i, n in enumerate(names))
    return Panel("components", "Reward components, unweighted", "reward", curves)


def _new_axes(title: str, y_label: str) -> Axes:
    axes = Figure(figsize=(6.4, 3.4), layout="constrained").subplots()
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return axes


def _finish(axes: Axes, key: str) -> Picture:
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return Picture(key, axes.get_title(loc="left"), buffer.getvalue())


def _draw_panel(stage: Stage, panel: Panel) -> Picture:
    axes = _new_axes(panel.title, panel.y_label)
    for curve in panel.curves:
        _draw_curve(axes, stage, curve)
    if panel is LEARNING_RATE:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(0, 0))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="best")
    return _finish(axes, panel.key)


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


def _draw_timing(stage: Stage) -> Picture:
    """Seconds per iteration, phases stacked; neighbouring iterations are averaged where there are many."""
    phases = {
        name.removeprefix("timing_s/"): points
        for name, points in stage.metrics.items()
        if name.startswith("timing_s/")
    }
    ordered = sorted(phases, key=lambda phase: (list(PHASES).index(phase) if phase in PHASES else len(PHASES), phase))
    steps = sorted({step for points in phases.values() for step in points})
    size = -(-len(steps) // MOST_BARS)
    bins = [np.array(steps[start : start + size]) for start in range(0, len(steps), size)]
    centers = np.array([group.mean() for group in bins])
    width = 0.85 * (float(np.diff(centers).min()) if len(centers) > 1 else 1.0)
    axes = _new_axes("Time per iteration", "seconds")
    bottom = np.zeros(len(bins))
    spare = iter(EXTRA * 4)
    for phase in ordered:
        points = phases[phase]
        heights = np.array([np.mean([points.get(step, 0.0) for step in group.tolist()]) for group in bins])
        axes.bar(centers, heights, width, bottom, color=PHASES.get(phase) or next(spare), label=phase)
        bottom += heights
    axes.grid(axis="x", visible=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return _finish(axes, "timing")
