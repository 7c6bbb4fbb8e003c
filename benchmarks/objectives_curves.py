"""What several seeds of several objectives say together: means, standard errors, rewards at equal KL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignment.ppo.estimate import mean_and_sem

JUDGE, KL = "eval/judge_reward_mean", "eval/kl_mean"
METRICS = {  # name in results: metric of an evaluation
    "judge_reward": JUDGE,
    "win_rate": "eval/win_rate",
    "kl": KL,
    "reward": "eval/reward_mean",
    "length": "eval/length_mean",
}


def curves_of(evaluations: Sequence[dict[str, float]], per_step: int) -> dict[str, list[float]]:
    """{"time" and every name of METRICS: a value for each evaluation of the policy's own answers}.

    Args: per_step: what a step counts on the axis of time: the episodes of an iteration, or 1.
    """
    rows = [row for row in evaluations if JUDGE in row]
    curves = {"time": [row["step"] * per_step for row in rows]}
    return curves | {name: [row[metric] for row in rows] for name, metric in METRICS.items()}


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "sem"} of a number for each seed; the standard error is 0 for a single one."""
    return dict(zip(("mean", "sem"), mean_and_sem(np.asarray(values, dtype=np.float64)), strict=True))


def common_kl(runs: Sequence[dict[str, list[float]]]) -> float:
    """The largest KL that every run reached at some evaluation."""
    return min(max(run["kl"]) for run in runs)


def reward_at_kl(run: dict[str, list[float]], kl: float) -> float:
    """The judge's reward where the run first reaches ``kl``, linear between the two evaluations around it.

    Raises: ValueError if it never does.
    """
    points = list(zip(run["kl"], run["judge_reward"], strict=True))
    if points[0][0] >= kl:
        return points[0][1]
    for (low, before), (high, after) in zip(points, points[1:], strict=False):
        if high >= kl:
            return before + (after - before) * (kl - low) / (high - low)
    raise ValueError(f"KL {kl} was not reached, only {max(run['kl'])}")


def summarize(runs: dict[str, list[dict[str, list[float]]]]) -> dict:
    """{"equal_kl": nats, "objectives": {name: {metric: over seeds, at the last evaluation}}}.

    "judge_gain" is the judge's reward less that of the same seed's first answers; "judge_reward_at_equal_kl" is read
    off every seed's own curve.

    Args: runs: of each objective, the curves of each seed.
    """
    kl = common_kl([run for seeds in runs.values() for run in seeds])
    objectives = {}
    for name, seeds in runs.items():
        last = {metric: over_seeds([run[metric][-1] for run in seeds]) for metric in METRICS}
        last["judge_gain"] = over_seeds([run["judge_reward"][-1] - run["judge_reward"][0] for run in seeds])
        last["judge_reward_at_equal_kl"] = over_seeds([reward_at_kl(run, kl) for run in seeds])
        objectives[name] = last
    return {"equal_kl": kl, "objectives": objectives}
