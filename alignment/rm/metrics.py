"""Numbers that say how good a reward model is, from NumPy arrays of scores; gather over ranks before calling.

``better`` and ``worse`` are float [N]: the end scores of the two answers of each pair.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import bootstrap

RESAMPLES = 999  # of the pairs, for the standard error of an ECE
TEMPERATURES = (0.01, 100.0)  # within which one is looked for: a model that ranks every pair right wants 0


class Calibration(NamedTuple):
    """Reliability curve over equal-width bins of predicted probability; all float64 [bins]."""

    count: np.ndarray
    predicted: np.ndarray  # sum of predicted probabilities in the bin
    observed: np.ndarray  # sum of outcomes in the bin


def preference_metrics(better: np.ndarray, worse: np.ndarray, bins: int = 10) -> dict[str, float]:
    """accuracy, margin, {min,mean,max}_reward, reward_std, ece, ace, mce. Raises ValueError for no pairs."""
    better, worse = np.asarray(better, np.float64), np.asarray(worse, np.float64)
    if better.size == 0:
        raise ValueError("preference metrics need at least one pair")
    margins, rewards = better - worse, np.concatenate([better, worse])
    return {
        "accuracy": preference_accuracy(better, worse),
        "margin": float(margins.mean()),
        "min_reward": float(rewards.min()),
        "mean_reward": float(rewards.mean()),
        "max_reward": float(rewards.max()),
        "reward_std": float(rewards.std(ddof=1)),
        **calibration_errors(calibration_curve(margins, np.ones_like(margins), bins)),
    }


def preference_accuracy(better: np.ndarray, worse: np.ndarray) -> float:
    """Share of pairs where the better answer scores higher. A tie counts half: a constant model is at chance, 0.5."""
    return float((np.sign(np.asarray(better, np.float64) - np.asarray(worse, np.float64)) + 1).mean() / 2)


def preferences(scores: np.ndarray, initial: np.ndarray, same: np.ndarray) -> np.ndarray:
    """float64 [N]: 1 where the judge prefers the answer to the initial policy's, 0 where not, 1/2 for a tie.

    Asked about both orders of a pair, a judge that scores each answer alone says the same twice; so this is the
    average over both positions.

    Args:
        scores, initial: float32 [N], the judge's, of the answer and of the initial policy's to the same prompt.
        same: bool [N], both answers have the same tokens: a tie, even where rounding parts their scores.
    """
    return np.where(same, 0.5, np.heaviside(scores.astype(np.float64) - initial, 0.5))


def calibration_curve(
    margins: np.ndarray, outcomes: np.ndarray, bins: int = 10, both_orders: bool = True
) -> Calibration:
    """Bins of p = sigmoid(margin) against what people said.

    margins [N]: score of the first answer less that of the second; outcomes [N]: 1 where people preferred the first,
    else 0. ``both_orders`` adds each pair the other way round (as APO does), which makes the curve symmetric about
    one half; needed where every pair lists its better answer first, or all outcomes would be 1. A bin includes its
    lower edge; the last one also p = 1.
    """
    margins, outcomes = np.asarray(margins, np.float64), np.asarray(outcomes, np.float64)
    if both_orders:
        margins, outcomes = np.concatenate([margins, -margins]), np.concatenate([outcomes, 1 - outcomes])
    probabilities = sigmoid(margins)
    index = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    summed = (np.ones_like(margins), probabilities, outcomes)
    return Calibration(*(np.bincount(index, weights, minlength=bins) for weights in summed))


def calibration_errors(curve: Calibration) -> dict[str, float]:
    """ece: sum_b |predicted_b - observed_b| / N; ace, mce: mean and max over non-empty bins of the gap of means."""
    filled = curve.count > 0
    gaps = np.abs(curve.predicted - curve.observed)[filled]
    mean_gaps = gaps / curve.count[filled]
    ece, ace, mce = gaps.sum() / curve.count.sum(), mean_gaps.mean(), mean_gaps.max()
    return {"ece": float(ece), "ace": float(ace), "mce": float(mce)}


def standard_errors(margins: np.ndarray) -> dict[str, float]:
    """Of accuracy and ece, over pairs with these better - worse, float [N]; 0 for a single pair.

    That of the ece, in both orders, is the bootstrap's (Efron, 1979), for an ece is no mean over pairs.
    """
    margins = np.asarray(margins, np.float64)
    if len(margins) < 2:
        return {"accuracy": 0.0, "ece": 0.0}

    def ece(sample: np.ndarray) -> float:
        return calibration_errors(calibration_curve(sample, np.ones_like(sample)))["ece"]

    drawn = bootstrap((margins,), ece, n_resamples=RESAMPLES, vectorized=False, method="percentile", random_state=0)
    accuracy = np.heaviside(margins, 0.5).std(ddof=1) / math.sqrt(len(margins))
    return {"accuracy": float(accuracy), "ece": float(drawn.standard_error)}


def negative_log_likelihood(margins: np.ndarray) -> float:
    """Mean of -log sigmoid(margin): what people's choices cost a model with these better - worse, float [N]."""
    return float(np.logaddexp(0.0, -np.asarray(margins, np.float64)).mean())


def fit_temperature(margins: np.ndarray) -> float:
    """The T within TEMPERATURES that minimises ``negative_log_likelihood(margins / T)`` (Guo et al., 2017).

    Args: margins: better - worse of held-out pairs, float [N]. Dividing by T changes no ranking.
    """
    margins = np.asarray(margins, np.float64)
    bounds = tuple(math.log(limit) for limit in TEMPERATURES)
    found = minimize_scalar(
        lambda exponent: negative_log_likelihood(margins * math.exp(-exponent)),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-8},
    )
    return math.exp(found.x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow, float64."""
    return 0.5 * (1 + np.tanh(np.asarray(x, np.float64) / 2))
