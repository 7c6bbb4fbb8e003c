"""Reward-model objectives and score normalisers as pure functions and plain state: no model, no I/O.

P pairs; each has an answer that people found better and one they found worse. ``denominator`` is the number of pairs
of the whole optimizer step, over all micro-batches and ranks; default: the pairs of this batch. Equal answers give
log 2 and no gradient under both ranking losses.
"""

from __future__ import annotations

from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from alignment.ppo.controllers import RunningMoments
from alignment.ppo.losses import masked_mean, masked_sum, mean_variance


class TokenScores(NamedTuple):
    """Scores of pairs, position by position; all [P, L]."""

    better: Tensor
    worse: Tensor
    compared: Tensor  # bool: from the first token that differs to the end of the longer answer


def sequence_ranking_loss(better: Tensor, worse: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Bradley-Terry loss: mean over pairs of -log sigmoid(better - worse); end scores [P]."""
    return _mean_over_pairs(-F.log_sigmoid(better - worse), denominator)


def align_token_scores(
    better_scores: Tensor,
    worse_scores: Tensor,
    better_ids: Tensor,
    worse_ids: Tensor,
    better_attention_mask: Tensor,
    worse_attention_mask: Tensor,
) -> TokenScores:
    """Token scores [P, L] of right-padded pairs (prompt + answer), ready to be compared.

    ids int64 [P, L]; attention masks bool [P, L], True = real token. An answer that has ended keeps the score of its
    last token, so that the rest of a longer answer is held against it: scores and ids of padding are never read.
    """
    differs = (better_ids != worse_ids) | (better_attention_mask != worse_attention_mask)
    started = differs.astype("int64").cumsum(axis=1) > 0
    return TokenScores(
        better=_hold_last(better_scores, better_attention_mask),
        worse=_hold_last(worse_scores, worse_attention_mask),
        compared=started & (better_attention_mask | worse_attention_mask),
    )


def _hold_last(scores: Tensor, mask: Tensor) -> Tensor:
    last = (mask.astype("int64").sum(axis=1, keepdim=True) - 1).clip(min=0)
    position = paddle.arange(mask.shape[1], dtype="int64").unsqueeze(0)
    return paddle.take_along_axis(scores, paddle.minimum(position, last), axis=1)


def token_ranking_loss(scores: TokenScores, denominator: float | Tensor | None = None) -> Tensor:
    """Mean over pairs of the mean of -log sigmoid(better_t - worse_t) over the compared positions."""
    losses = -F.log_sigmoid(_compared(scores.better, scores) - _compared(scores.worse, scores))
    per_pair = _mean_over_compared(losses, scores.compared)
    equal = ~scores.compared.any(axis=1)
    return _mean_over_pairs(paddle.where(equal, F.softplus(paddle.zeros_like(per_pair)), per_pair), denominator)


def score_regularization(
    better: Tensor, worse: Tensor, compared: Tensor | None = None, denominator: float | Tensor | None = None
) -> Tensor:
    """Mean over pairs of better^2 + worse^2: end scores [P], or [P, L] with their mean over ``compared`` positions.

    Ranking losses fix scores only up to a constant; this holds them near 0. Multiply by the coefficient.
    """
    if compared is not None:
        zeros = paddle.zeros_like(better)
        better, worse = paddle.where(compared, better, zeros), paddle.where(compared, worse, zeros)
    squares = better**2 + worse**2
    return _mean_over_pairs(squares if compared is None else _mean_over_compared(squares, compared), denominator)


def _compared(x: Tensor, scores: TokenScores) -> Tensor:
    return paddle.where(scores.compared, x, paddle.zeros_like(x))


def _mean_over_compared(x: Tensor, compared: Tensor) -> Tensor:
    return masked_sum(x, compared, axis=1) / compared.sum(axis=1).clip(min=1).astype(x.dtype)


def _mean_over_pairs(per_pair: Tensor, denominator: float | Tensor | None) -> Tensor:
    return masked_mean(per_pair, paddle.ones(per_pair.shape, dtype="bool"), denominator)


class RunningMeanStd(RunningMoments):
    """Score normaliser with the mean and unbiased variance of all scores seen; update() merges exactly over ranks."""


class ExponentialMovingAverage(RunningMoments):
    """Score normaliser with exponential averages of each batch's mean and unbiased variance.

    new = momentum * batch + (1 - momentum) * old: momentum in (0, 1] is the weight of the new batch. The first batch
    is taken whole; update() takes moments added over all ranks.
    """

    def __init__(self, momentum: float = 0.9):
        """Raises ValueError for a momentum outside (0, 1]."""
        super().__init__()
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"normalizer_momentum {momentum}: the weight of the new batch is in (0, 1]")
        self.momentum = momentum

    def update(self, moments: Tensor) -> None:
        """moments: float64 [3], losses.masked_moments of the batch, added over all ranks. No values: no change."""
        count = float(moments[0])
        if count == 0:
            return
        mean, variance = mean_variance(moments)
        weight = 1.0 if self.count == 0 else self.momentum
        self.mean += weight * (mean - self.mean)
        self.variance += weight * (variance - self.variance)
        self.count += count
