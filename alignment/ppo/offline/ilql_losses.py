"""Implicit language Q-learning (ILQL, Snell et al. 2022, arXiv:2206.11871) as pure functions: no model, no I/O.

Notation as in alignment.ppo.losses: [B, T], mask, denominator. At each action a in a state s, which is the text before
it, the heads give Q_1 and Q_2, their slow copies the targets, and V. A term is a float [B, T], one number a token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor

from alignment.ppo.losses import LARGEST_EXPONENT, keep, masked_mean, sum_stat


class ActionValues(NamedTuple):
    """What policy and heads say about the actions, each float32 [B, T]."""

    log_probs: Tensor  # log pi(a | s)
    q_1: Tensor  # Q_1(s, a)
    q_2: Tensor
    q_1_log_probs: Tensor  # log softmax(Q_1(s, .))[a]
    q_2_log_probs: Tensor
    target_q: Tensor  # the smaller one of the two target heads' Q(s, a)
    values: Tensor  # V(s)


class IlqlStats(NamedTuple):
    """Sums over the valid tokens."""

    tokens: Tensor  # number of valid tokens
    td: Tensor  # of the four terms, before they are scaled
    expectile: Tensor
    cql: Tensor
    awac: Tensor
    q: Tensor  # mean of both heads
    target_q: Tensor
    values: Tensor
    weight: Tensor  # AWAC's exp(beta (Q - V)) after clipping
    weight_sq: Tensor  # weight^2 / weight_sq is the effective number of tokens
    clipped: Tensor  # tokens whose weight was cut


def next_values(values: Tensor, mask: Tensor) -> Tensor:
    """V of the state in which the next action is taken, 0 after an answer's last action; no gradient.

    [B, T] -> [B, T], 0 where masked. Masked positions are skipped, not stepped through. An answer cut at the length
    limit counts as ended, because its score judges the text as it stands.
    """
    valid = mask.numpy()
    value = np.where(valid, values.numpy(), 0)
    result, following = np.zeros_like(value), np.zeros_like(value[:, 0])
    for t in reversed(range(valid.shape[1])):
        result[:, t] = np.where(valid[:, t], following, 0)
        following = np.where(valid[:, t], value[:, t], following)
    return paddle.to_tensor(result)


def td_terms(q: Tensor, rewards: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    """(Q - (r + gamma V'))^2 of one head; V' is ``next_values``, so that no gradient flows through it."""
    return (q - (rewards + gamma * next_value)) ** 2


def expectile_terms(values: Tensor, target_q: Tensor, tau: float) -> Tensor:
    """|tau - 1[u < 0]| u^2 with u = Q_target - V (arXiv:2110.06169, eq. 5); no gradient through Q_target.

    V becomes the tau-expectile of Q under the actions of the data: their mean for 0.5, near their maximum for 1.
    """
    difference = target_q.detach() - values
    share = paddle.where(difference < 0, paddle.full_like(difference, 1 - tau), paddle.full_like(difference, tau))
    return share * difference**2


def awac_weights(target_q: Tensor, values: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """exp(beta (Q_target - V)), cut at exp(30) as in ``awr_loss``, and bool where it was cut; no gradient."""
    exponent = beta * (target_q - values).detach()
    return exponent.clip(max=LARGEST_EXPONENT).exp(), exponent > LARGEST_EXPONENT


def ilql_loss(
    actions: ActionValues,
    rewards: Tensor,
    mask: Tensor,
    tau: float = 0.6,
    gamma: float = 0.99,
    cql_scale: float = 0.1,
    awac_scale: float = 1.0,
    beta: float = 0.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, IlqlStats]:
    """Mean of td + expectile + cql_scale cql + awac_scale awac (arXiv:2206.11871); defaults: the authors of APA.

        td         (Q_1 - y)^2 + (Q_2 - y)^2, y = r + gamma V'
        expectile  |tau - 1[Q_target < V]| (Q_target - V)^2
        cql        -log softmax(Q_1)[a] - log softmax(Q_2)[a] = logsumexp(Q) - Q(a) of both heads
        awac       -exp(beta (Q_target - V)) log pi(a | s); with beta 0 behaviour cloning

    Args: rewards: [B, T], r of each action.
    """
    actions = ActionValues(*(keep(x, mask) for x in actions))
    log_probs, q_1, q_2, q_1_log_probs, q_2_log_probs, target_q, values = actions
    target_q = target_q.detach()
    following, rewards = next_values(values, mask), keep(rewards, mask)
    td = td_terms(q_1, rewards, following, gamma) + td_terms(q_2, rewards, following, gamma)
    expectile = expectile_terms(values, target_q, tau)
    cql = -q_1_log_probs - q_2_log_probs
    weight, clipped = awac_weights(target_q, values, beta)
    awac = -weight * log_probs
    loss = masked_mean(td + expectile + cql_scale * cql + awac_scale * awac, mask, denominator)
    wide = weight.astype("float64")
    sums = (td, expectile, cql, awac, (q_1 + q_2) / 2, target_q, values, wide, wide * wide, clipped)
    return loss, IlqlStats(mask.sum().astype("float64"), *(sum_stat(x, mask) for x in sums))
