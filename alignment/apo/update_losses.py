"""Losses of policy updates from scored answers, as pure functions: no model, no I/O.

N answers to some prompts, those to one prompt an item; P pairs of answers to one prompt with different scores.
``denominator``: what a sum over this batch is divided by, the items (RRHF) or pairs (DPO, IPO) of the whole optimizer
step, over all micro-batches and ranks, so that they add up exactly whatever the split.
"""

from __future__ import annotations

import numpy as np
import paddle.nn.functional as F
from paddle import Tensor

from alignment.rm.losses import Pairs


def find_best(item: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """int64 [B]: the place of each item's answer with the highest score, of several the first.

    Args: as alignment.rm.losses.compared_pairs.
    """
    order = np.lexsort((np.arange(len(item)), -scores, item))  # by item, the best first, ties in their order
    return order[np.unique(item[order], return_index=True)[1]]


def ranking_loss(log_probs: Tensor, pairs: Pairs, denominator: float) -> Tensor:
    """RRHF's ranking (arXiv:2304.05302, eq. 3): sum over pairs of max(0, p_worse - p_better), over ``denominator``.

    log_probs: p, float [N]: an answer's log-probability over its length in tokens.
    """
    return F.relu(log_probs[pairs.worse] - log_probs[pairs.better]).sum() / denominator


def best_answer_loss(log_probs: Tensor, best: np.ndarray, denominator: float) -> Tensor:
    """RRHF's cross-entropy: sum of -p over each item's best answer, over ``denominator``; log_probs as above.

    The paper (eq. 4) sums over the answer's tokens, its authors' code averages them: so here.
    """
    return -log_probs[best].sum() / denominator


def dpo_loss(margins: Tensor, beta: float, denominator: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv:2305.18290, eq. 7): sum over pairs of -log sigmoid(beta h), over ``denominator``.

    margins: h, float [P]: log(pi / ref) of the better answer less that of the worse one, sums over their tokens.
    label_smoothing: conservative DPO: the share e of pairs believed to be the wrong way round, which gives
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), least where sigmoid(beta h) = 1 - e.
    """
    rewards = beta * margins
    losses = -(1 - label_smoothing) * F.log_sigmoid(rewards) - label_smoothing * F.log_sigmoid(-rewards)
    return losses.sum() / denominator


def ipo_loss(margins: Tensor, beta: float, denominator: float) -> Tensor:
    """IPO (arXiv:2310.12036, eq. 17): sum over pairs of (h - 1 / (2 beta))^2, over ``denominator``; as in dpo_loss.

    h is a difference of sums over tokens, as in the paper; some implementations take means.
    """
    return ((margins - 1 / (2 * beta)) ** 2).sum() / denominator
