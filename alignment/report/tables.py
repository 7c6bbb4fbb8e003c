"""The numbers of a report: headline rows, paired comparison, samples side by side, arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.report.reading import Stage

NOT_AVAILABLE = "n/a"
HEADLINES = {  # metric -> label, in the order of the table's rows
    "ppo": {
        "eval/reward_mean": "Held-out reward",
        "eval/judge_reward_mean": "Held-out reward by the judge",
        "eval/win_rate": "Win rate against the initial policy (share)",
        "eval/kl_mean": "KL to the reference (nats per answer)",
        "eval/length_mean": "Answer length (tokens)",
        "eval/truncated_rate": "Truncated answers (share)",
    },
    "offline": {
        "eval/reward_mean": "Held-out reward",
        "eval/kl_mean": "KL to the reference (nats per answer)",
        "eval/length_mean": "Answer length (tokens)",
        "eval/loss": "Loss on held-out logged answers",
        "eval/vf_explained_var": "Variance of held-out returns that the critic explains",
        "loss/policy_avg": "Training loss",
    },
    "rm": {
        "eval/accuracy": "Held-out accuracy",
        "eval/margin": "Held-out margin",
        "eval/loss": "Held-out loss",
        "accuracy": "Training accuracy",
        "loss": "Training loss",
    },
    "sft": {"eval/loss": "Held-out loss (nats per token)", "loss": "Training loss (nats per token)"},
    "update": {
        "eval/loss": "Held-out loss",
        "eval/accuracy": "Held-out accuracy",
        "eval/rewards/margin": "Held-out margin of the implicit reward",
        "eval/logps/chosen": "Held-out log-probability, chosen answers",
        "eval/logps/rejected": "Held-out log-probability, rejected answers",
        "eval/log_ratio": "Log-ratio to the initial policy (nats per answer)",
        "loss": "Training loss",
    },
}

ERRORS = {  # metric -> its standard error
    "eval/reward_mean": "eval/reward_sem",
    "eval/judge_reward_mean": "eval/judge_reward_sem",
    "eval/win_rate": "eval/win_rate_sem",
}


@dataclass(frozen=True)
class Paired:
    """Change of the reward per held-out prompt: n prompts, mean difference, its standard error, their ratio.

    standard_error = std(d, ddof=1) / sqrt(n) over the n per-prompt differences d; ratio = difference / standard_error.
    Both are NaN where undefined (n < 2, or no spread).
    """

    count: int
    start: float
    final: float
    difference: float
    standard_error: float
    ratio: float


def compare_rewards(samples: Iterable[dict[str, Any]]) -> Paired | None:
    """Pair the rewards of the first and the last evaluated step by prompt_id.

    Several answers to a prompt are averaged first; prompts not evaluated at both steps do not count. None if there
    are not two steps with a common prompt.
    """
    rewards: dict[int, dict[Any, list[float]]] = {}
    for row in samples:
        if isinstance(row.get("reward"), (int, float)) and math.isfinite(row["reward"]):
            rewards.setdefault(row["step"], {}).setdefault(row["prompt_id"], []).append(row["reward"])
    if len(rewards) < 2:
        return None
    first, last = rewards[min(rewards)], rewards[max(rewards)]
    common = sorted(first.keys() & last.keys())
    if not common:
        return None
    before = np.array([np.mean(first[key]) for key in common])
    after = np.array([np.mean(last[key]) for key in common])
    difference = after - before
    error = float(difference.std(ddof=1) / math.sqrt(len(common))) if len(common) > 1 else math.nan
    ratio = float(difference.mean()) / error if error > 0 else math.nan
    return Paired(len(common), float(before.mean()), float(after.mean()), float(difference.mean()), error, ratio)


def headline(stage: Stage) -> list[dict[str, str]]:
    """Rows {"label", "start", "final", "change"}: each metric's first and last value, +- standard error if known."""
    rows = []
    for name, label in HEADLINES[stage.kind].items():
        _, values = stage.series(name)
        if not len(values):
            continue
        _, errors = stage.series(ERRORS.get(name, ""))
        cells = [number(value) for value in (values[0], values[-1])]
        if len(errors) == len(values):
            cells = [f"{cell} ± {number(error)}" for cell, error in zip(cells, (errors[0], errors[-1]), strict=True)]
        change = number(values[-1] - values[0], signed=True) if len(values) > 1 else NOT_AVAILABLE
        rows.append({"label": label, "start": cells[0], "final": cells[1], "change": change})
    return rows


def verdict(paired: Paired | None) -> str:
    """One sentence: by how much, and how sure."""
    if paired is None:
        return ""
    change = f"Over {paired.count} held-out prompts the reward changed by {number(paired.difference, signed=True)}"
    if math.isnan(paired.ratio):
        return f"{change}; a standard error cannot be computed."
    return (
        f"{change}, with a paired standard error of {number(paired.standard_error)}: "
        f"{number(abs(paired.ratio))} standard errors {'above' if paired.difference > 0 else 'below'} the start."
    )


def side_by_side(samples: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The first `limit` prompts of the first evaluation, unselected, with their answers then and at the last one.

    Each: {"prompt", "before": row, "after": row or None if the run was evaluated once}. One answer a prompt.
    """
    if not samples:
        return []
    steps = [row["step"] for row in samples]
    by_step: dict[int, dict[Any, dict]] = {min(steps): {}, max(steps): {}}
    for row in samples:
        if row["step"] in by_step:
            by_step[row["step"]].setdefault(row["prompt_id"], row)
    before, after = by_step[min(steps)], by_step[max(steps)] if max(steps) > min(steps) else {}
    chosen = [key for key in before if key in after or not after][:limit]
    return [{"prompt": before[key]["prompt"], "before": before[key], "after": after.get(key)} for key in chosen]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries -> {"a.b": text}."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else repr(value)
    return flat


def number(value: Any, signed: bool = False) -> str:
    """Four significant digits, plain notation where it is readable."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return NOT_AVAILABLE
    return format(value, "+.4g" if signed else ".4g")
