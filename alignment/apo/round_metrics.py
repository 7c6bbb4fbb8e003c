"""Numbers that say what a policy's answers are worth to a judge, from NumPy arrays of its scores.

N prompts with K answers each; a prompt is what is independent of others, so its answers count as one, their mean.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from alignment.rm.metrics import preferences

CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean over prompts; ``standard_error`` is 0 for a single one."""

    mean: float
    standard_error: float


class Interval(NamedTuple):
    """A share of prompts, with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


class Answers(NamedTuple):
    """Of a policy to N prompts: names of the prompts, texts as lists of K, the judge's scores float64 [N, K]."""

    query_ids: list[str]
    texts: list[list[str]]
    scores: np.ndarray


def mean_score(values: np.ndarray) -> Mean:
    """Mean of float [N, K] over prompts and its standard error, sample deviation over sqrt(N)."""
    per_prompt = np.asarray(values, np.float64).mean(axis=1)
    count = len(per_prompt)
    return Mean(float(per_prompt.mean()), float(per_prompt.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0)


def win_rate(answers: Answers, others: Answers) -> Interval:
    """How often the judge prefers answer k to the other policy's answer k to the same prompt; a tie counts half.

    Equal texts tie. The judge scores each answer alone, so the average over both positions of a pair is the same.
    """
    pairs = zip(answers.texts, others.texts, strict=True)
    same = np.array([[a.strip() == b.strip() for a, b in zip(*texts, strict=True)] for texts in pairs])
    wins = preferences(answers.scores, others.scores, same).mean(axis=1)
    return wilson_interval(float(wins.mean()), len(wins))


def wilson_interval(share: float, count: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share of ``count`` draws; with ties, which vary less, a little too wide."""
    z = float(norm.ppf((1 + confidence) / 2))
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(center - reach, 0.0), min(center + reach, 1.0))


def common(answers: Answers, others: Answers) -> tuple[Answers, Answers]:
    """Both, less the prompts that only one of them has."""
    shared = set(answers.query_ids) & set(others.query_ids)
    return _only(answers, shared), _only(others, shared)


def by_source(answers: Answers, others: Answers) -> dict[str, tuple[Answers, Answers]]:
    """Both, divided by the data sets that the names of their prompts, "<data set>/<place>", begin with."""
    names: dict[str, set[str]] = {}
    for query_id in answers.query_ids:
        names.setdefault(query_id.rpartition("/")[0], set()).add(query_id)
    return {source: (_only(answers, own), _only(others, own)) for source, own in names.items()}


def _only(answers: Answers, wanted: set[str]) -> Answers:
    places = sorted((name, place) for place, name in enumerate(answers.query_ids) if name in wanted)
    order = [place for _, place in places]
    return Answers([name for name, _ in places], [answers.texts[i] for i in order], answers.scores[order])
