"""The numbers of one run: headline rows, paired comparison, alerts, arguments."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.report.reading import Stage, finite

NOT_AVAILABLE = "n/a"
ANSWERS = {  # metric of a policy's own answers to held-out prompts -> label
    "eval/reward_mean": "Held-out reward",
    "eval/judge_reward_mean": "Held-out reward by the judge",
    "eval/win_rate": "Win rate against the initial policy (share)",
    "eval/kl_mean": "KL to the reference (nats per answer)",
    "eval/length_mean": "Answer length (tokens)",
    "eval/truncated_rate": "Truncated answers (share)",
}
HEADLINES = {  # metric -> label, in the order of the table's rows
    "ppo": ANSWERS,
    "offline": {
        **ANSWERS,
        "eval/loss": "Loss on held-out logged answers",
        "eval/vf_explained_var": "Variance of held-out returns that the critic explains",
        "loss/policy_avg": "Training loss",
        "loss/ilql_avg": "ILQL's training loss",
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
    "eval/kl_mean": "eval/kl_sem",
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

    Several answers to a prompt are averaged first; prompts not evaluated at both steps do not count, nor answers that
    were steered when decoding. None if there are not two steps with a common prompt.
    """
    rewards: dict[int, dict[Any, list[float]]] = {}
    for row in samples:
        if "decoding" not in row and (reward := finite(row.get("reward"))) is not None:
            rewards.setdefault(row["step"], {}).setdefault(row["prompt_id"], []).append(reward)
    if len(rewards) < 2:
        return None
    first, last = rewards[min(rewards)], rewards[max(rewards)]
    common = [key for key in first if key in last]
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
            cells = [with_error(values[place], errors[place]) for place in (0, -1)]
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


def summarize_alerts(alerts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One {"alert", "steps", "message"} for each kind of alert, with its last message, in the order of appearance."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in alerts:
        kinds.setdefault(str(row["alert"]), []).append(row)
    summary = []
    for alert, rows in kinds.items():
        first, last = rows[0]["step"], rows[-1]["step"]
        steps = f"step {first}" if len(rows) == 1 else f"{len(rows)} times, step {first} to {last}"
        summary.append({"alert": alert, "steps": steps, "message": str(rows[-1]["message"])})
    return summary


def describe_record(stage: Stage) -> dict[str, dict[str, str]]:
    """{heading: {name: text}} of run.json: the run itself, then its arguments, versions and topology."""
    run = dict(stage.run)
    if isinstance(run.get("command"), list):
        run["command"] = shlex.join(map(str, run["command"]))
    scalars = {name: value for name, value in run.items() if not isinstance(value, dict)}
    groups = {"command": scalars} | {name: value for name, value in run.items() if isinstance(value, dict)}
    return {name: flatten(group) for name, group in groups.items() if group}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries -> {"a.b": text}, as an argument file would have it."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def number(value: Any, signed: bool = False) -> str:
    """Four significant digits, plain notation where it is readable."""
    known = finite(value)
    if known is None:
        return NOT_AVAILABLE
    return format(known, "+.4g" if signed else ".4g")


def with_error(value: float, error: float) -> str:
    """A value with its standard error, both to the error's second digit."""
    if not 1e-3 < error < 1e6:
        return f"{number(value)} ± {number(error)}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} ± {error:.{places}f}"
