"""Reward-model objectives and score normalisers as pure functions and plain state: no model, no I/O.

P pairs; each has an answer that people found better and one they found worse, or, in APO (arXiv:2311.08045), a golden
answer and a policy's sample. A comparison of more answers is all its ordered pairs. Sums over pairs are divided by
their number in the whole optimizer step, over all micro-batches and ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from alignment.ppo.controllers import RunningMoments
from alignment.ppo.losses import masked_mean, masked_sum, mean_variance

APO_LOSS_TYPES = ("ranking", "diff")


class Objective(NamedTuple):
    """What the two kinds of pairs weigh, in the names of APO's code, and the loss of APO's."""

    rm_kl_coeff: float = 1.0
    apo_loss_coeff: float = 0.0
    apo_sample_num: int = 1
    apo_loss_type: str = "ranking"


class TokenScores(NamedTuple):
    """Scores of pairs, position by position; all [P, L]."""

    better: Tensor
    worse: Tensor
    compared: Tensor  # bool: from the first token that differs to the end of the longer answer


class Pairs(NamedTuple):
    """Rows int64 [P] of two answers to one prompt."""

    better: np.ndarray
    worse: np.ndarray


def compared_pairs(item: np.ndarray, scores: np.ndarray) -> Pairs:
    """All ordered pairs of one item's answers with score_better > score_worse; tied scores give no pair.

    Args: item: int64 [N], whose answer a row is; scores: float [N].
    """
    return Pairs(*np.nonzero((item[:, None] == item) & (scores[:, None] > scores)))


def pair_losses(margins: Tensor, is_diff: Tensor | None = None) -> Tensor:
    """-log sigmoid(margin) (Bradley-Terry; APO's GAIL-like loss), or -margin (WGAN-like) where ``is_diff``.

    Args: margins: score of the better answer less that of the worse, any shape; is_diff: bool, default nowhere.
    """
    losses = -F.log_sigmoid(margins)
    return losses if is_diff is None else paddle.where(is_diff, -margins, losses)


def comparison_loss(losses: Tensor, is_apo: Tensor, denominator: float, objective: Objective) -> Tensor:
    """Sum of weight * loss over ``denominator``, a scalar; a pair weighs rm_kl_coeff, or apo_loss_coeff /
    apo_sample_num if it is APO's.

    APO's equation 17 with the weights of the authors' commands, whose items are a batch each: what a pair weighs does
    not depend on the kinds of those beside it. People's pairs are what stands for the KL to their preferences.

    Args: losses: [P], of ``pair_losses`` or ``token_pair_losses``; is_apo: bool [P]; denominator: all pairs of the
        optimizer step, of both kinds.
    """
    human, apo = objective.rm_kl_coeff, objective.apo_loss_coeff / objective.apo_sample_num
    weights = paddle.where(is_apo, paddle.full_like(losses, apo), paddle.full_like(losses, human))
    return _mean_over_pairs(losses * weights, denominator)


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


def token_pair_losses(scores: TokenScores, is_diff: Tensor | None = None) -> Tensor:
    """[P]: mean of ``pair_losses`` of better_t - worse_t over the compared positions; of equal answers at margin 0.

    Args: is_diff: bool [P].
    """
    is_diff = None if is_diff is None else is_diff.unsqueeze(1)
    margins = _compared(scores.better, scores) - _compared(scores.worse, scores)
    per_pair = _mean_over_compared(pair_losses(margins, is_diff), scores.compared)
    at_zero = pair_losses(paddle.zeros_like(margins[:, :1]), is_diff).squeeze(1)
    return paddle.where(~scores.compared.any(axis=1), at_zero, per_pair)


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
