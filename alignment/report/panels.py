"""Which metrics are drawn together, for each kind of stage."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from alignment.report.reading import Stage
from alignment.report.style import EXTRA, HELD_OUT, THIRD, TRAIN


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


def _pair(train: str, held_out: str, errors: str | None = None) -> tuple[Curve, ...]:
    return Curve(train, "training", TRAIN), Curve(held_out, "held-out", HELD_OUT, errors)


def _sides(name: str) -> tuple[Curve, ...]:
    return Curve(f"{name}/chosen", "chosen", THIRD), Curve(f"{name}/rejected", "rejected", EXTRA[1])


JUDGE = Panel(
    "judge",
    "Judge's reward",
    "reward of a model not trained on",
    (Curve("eval/judge_reward_mean", "held-out", HELD_OUT, "eval/judge_reward_sem"),),
)
WIN_RATE = Panel(
    "win_rate",
    "Win rate against the initial policy",
    "share of prompts",
    (Curve("eval/win_rate", "held-out", HELD_OUT, "eval/win_rate_sem"),),
)
PANELS = {
    "ppo": (
        Panel("reward", "Reward", "reward", _pair("rollout/reward_mean", "eval/reward_mean", "eval/reward_sem")),
        JUDGE,
        WIN_RATE,
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
        JUDGE,
        WIN_RATE,
        Panel("kl", "KL to the reference", "nats per answer", (Curve("eval/kl_mean", "held-out", HELD_OUT),)),
        Panel("length", "Answer length", "tokens", (Curve("eval/length_mean", "held-out", HELD_OUT),)),
        Panel("truncated", "Truncated answers", "share", (Curve("eval/truncated_rate", "held-out", HELD_OUT),)),
        Panel(
            "policy_loss",
            "Policy loss",
            "loss",
            (*_pair("loss/policy_avg", "eval/loss"), Curve("loss/ilql_avg", "training", TRAIN)),
        ),
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


def panels_of(stage: Stage) -> list[Panel]:
    """The stage's plots that have something to show."""
    components = [] if stage.kind == "update" else [_component_panel(stage)]  # whose rewards/ are implicit ones
    panels = [*(_with_decodings(panel, stage) for panel in PANELS[stage.kind]), *components, LEARNING_RATE]
    return [panel for panel in panels if any(curve.metric in stage.metrics for curve in panel.curves)]


def _with_decodings(panel: Panel, stage: Stage) -> Panel:
    """With what answers by the further betas of ILQL's decoding are worth, beside the first one's."""
    betas = dict.fromkeys(match[1] for name in stage.metrics if (match := re.match(r"eval/beta_([^/]+)/", name)))
    colors = (THIRD, *EXTRA)
    more = [
        Curve(
            curve.metric.replace("eval/", f"eval/beta_{beta}/"),
            f"{curve.label}, beta {beta}",
            colors[place % len(colors)],
            curve.errors and curve.errors.replace("eval/", f"eval/beta_{beta}/"),
        )
        for place, beta in enumerate(betas)
        for curve in panel.curves
        if curve.metric.startswith("eval/")
    ]
    return replace(panel, curves=(*panel.curves, *(curve for curve in more if curve.metric in stage.metrics)))


def _component_panel(stage: Stage) -> Panel:
    """The parts of a weighted sum of rewards."""
    names = sorted(name for name in stage.metrics if name.startswith("rewards/"))
    colors = (TRAIN, HELD_OUT, THIRD, *EXTRA)
    curves = tuple(Curve(n, n.removeprefix("rewards/"), colors[i % len(colors)]) for i, n in enumerate(names))
    return Panel("components", "Reward components, unweighted", "reward", curves)
