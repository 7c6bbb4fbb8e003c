"""Objectives and estimators of online RL as pure functions: no model, no I/O.

Notation used in every docstring
    B answers, T = tokens of the longest answer, V = vocabulary. Only answer tokens are here, never the prompt.
    mask     bool [B, T], True = an action of the policy. EOS is an action; what follows it is not, and an answer cut
             short has no EOS action. Values where mask is False are never read: they may be NaN.
    log_probs, old_log_probs, ref_log_probs    float32 [B, T]: the policy being trained, the policy that sampled, and
             the frozen reference, each the log-probability of the token that was sampled.
    denominator    what a sum over this batch is divided by: the number of valid tokens of the whole optimizer step,
             over all micro-batches and ranks, so that accumulation and data parallelism add up exactly. Default: the
             valid tokens of this batch. An empty mask gives 0.

Sums in the stats tuples are float64 scalars without gradient: add them over micro-batches and ranks, divide once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

IGNORED_LABEL = -100
VARIANCE_EPSILON = 1e-8
SMALLEST_PROB = 1e-37  # in the entropy, so that p = 0 adds 0 log(1e-37) = 0 on any device (CPU softmax never gives 0)
# exp(30) = 1e13: also the square of such a gradient, in its norm and in Adam's moments, is a finite float32.
LARGEST_EXPONENT = 30.0


class PolicyStats(NamedTuple):
    """Sums over the valid tokens of a policy loss; the ratio is exp(log_probs - old_log_probs)."""

    tokens: Tensor  # number of valid tokens
    approxkl: Tensor  # 0.5 (log ratio)^2, TRL's approximation of KL(old || new)
    clipped: Tensor  # tokens whose term the clip changed: PPO's ratio, AWR's weight; 0 for APA
    ratio: Tensor
    ratio_sq: Tensor
    weight: Tensor  # AWR's exp(A / beta) after clipping; 0 for PPO and APA
    weight_sq: Tensor  # weight^2 / weight_sq is AWR's effective number of tokens


class ValueStats(NamedTuple):
    """Sums over the valid tokens of the value loss."""

    tokens: Tensor
    clipped: Tensor  # tokens where the clipped error was the larger one


# ---- masked sums ----------------------------------------------------------------------------------------------------


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """x with masked positions set to 0 by selection: a product would turn NaN or infinite padding into NaN."""
    return paddle.where(mask, x, paddle.zeros_like(x))


def masked_sum(x: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Sum of x over the True positions of mask (same shape), over all axes or over one."""
    return keep(x, mask).sum(axis=axis)


def masked_mean(x: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Sum of x over the True positions of mask, divided by the denominator (module docstring); a scalar."""
    return _divide(masked_sum(x, mask), mask.sum() if denominator is None else denominator)


def _divide(total: Tensor, denominator: float | Tensor) -> Tensor:
    if not isinstance(denominator, Tensor):
        return total / (denominator or 1.0)
    denominator = denominator.detach().astype(total.dtype)
    return total / paddle.where(denominator == 0, paddle.ones_like(denominator), denominator)


def sum_stat(x: Tensor, mask: Tensor) -> Tensor:
    """float64 sum of x over the True positions of mask, without gradient: a field of a stats tuple."""
    return masked_sum(x.detach().astype("float64"), mask)


# ---- moments and whitening ------------------------------------------------------------------------------------------


def masked_moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """float64 [3]: count, sum and sum of squares of x over mask (default: all). Add over ranks, then mean_variance."""
    x = x.detach().astype("float64")
    mask = paddle.ones(x.shape, dtype="bool") if mask is None else mask
    return paddle.stack([mask.sum().astype("float64"), masked_sum(x, mask), masked_sum(x * x, mask)])


def mean_variance(moments: Tensor) -> tuple[float, float]:
    """Mean and unbiased variance (divisor n - 1) from masked_moments; the variance of fewer than two values is 0."""
    count, total, squares = moments.tolist()
    if count == 0:
        return 0.0, 0.0
    mean = total / count
    return mean, max(squares - count * mean * mean, 0.0) / (count - 1) if count > 1 else 0.0


def whiten(x: Tensor, mask: Tensor, moments: Tensor | None = None) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the True positions of mask; 0 elsewhere. [B, T] -> [B, T].

    The mean is subtracted and the variance is unbiased (as TRL and verl; OpenRLHF's is biased). ``moments``: those of
    a larger set that x is part of, say all ranks; default: those of x itself.
    """
    mean, variance = mean_variance(masked_moments(x, mask) if moments is None else moments)
    return keep((x - mean) / math.sqrt(variance + VARIANCE_EPSILON), mask)


def explained_variance(return_moments: Tensor, error_moments: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), each from masked_moments; 0 where the returns do not vary."""
    variance = mean_variance(return_moments)[1]
    return 1.0 - mean_variance(error_moments)[1] / variance if variance > 0 else 0.0


# ---- from logits ----------------------------------------------------------------------------------------------------


def log_probs_from_logits(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[ids] in float32: logits [B, T, V], ids int64 [B, T] -> [B, T].

    Through cross_entropy: on CPU Paddle 3.3's log_softmax needs a minute where this takes 0.03 s ([8, 32, 49152]).
    """
    return -F.cross_entropy(_tempered(logits, temperature), ids, reduction="none", ignore_index=IGNORED_LABEL)


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), float32: [B, T, V] -> [B, T]. Logits may be -inf."""
    probs = F.softmax(_tempered(logits, temperature), axis=-1)
    return -sum_last_axis(probs * probs.clip(min=SMALLEST_PROB).log())


def sum_last_axis(x: Tensor) -> Tensor:
    """x.sum(-1) in two steps: on CPUs Paddle 3.3.1 adds float32 one by one, which loses 1e-5 of 16384 numbers."""
    width = x.shape[-1]
    part = math.gcd(width, 256)
    return x.reshape([*x.shape[:-1], width // part, part]).sum(axis=-1).sum(axis=-1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    if logits.dtype != paddle.float64:
        logits = logits.astype("float32")
    return logits if temperature == 1.0 else logits / temperature


# ---- rewards and advantages -----------------------------------------------------------------------------------------


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own samples; 0 where masked. [B, T] -> [B, T].

    With r = ref_log_probs - log_probs (Schulman, "Approximating KL divergence", 2020):
        k1  -r               unbiased, may be negative
        k2  r^2 / 2          biased, low variance
        k3  exp(r) - 1 - r   unbiased, never negative; not clamped, so r = 12 gives 1.6e5
    The sign of r matters: with -r, k3 estimates chi-square minus KL. Raises ValueError for another kind.
    """
    r = keep(ref_log_probs, mask) - keep(log_probs, mask)
    if kind == "k1":
        return -r
    if kind == "k2":
        return 0.5 * r * r
    if kind == "k3":
        return paddle.expm1(r) - r
    raise ValueError(f"KL estimator {kind!r}: allowed are k1, k2, k3")


def penalize_missing_eos(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """scores [B] less ``penalty`` (>= 0) for each answer that did not end with EOS (finished bool [B] is False)."""
    return paddle.where(finished, scores, scores - penalty)


def token_rewards(
    scores: Tensor, kl: Tensor, kl_coeff: float, mask: Tensor, clip_range_score: float | None = None
) -> Tensor:
    """r_t = -kl_coeff * kl_t, plus the answer's score on its last valid token; 0 where masked.

    scores [B], clipped to +-clip_range_score first; kl [B, T] -> [B, T]. An answer without valid tokens gets no score.
    """
    if clip_range_score is not None:
        scores = scores.clip(-clip_range_score, clip_range_score)
    position = mask.astype("int64").cumsum(axis=1)
    last = mask & (position == position[:, -1:])
    rewards = keep(-kl_coeff * kl, mask)
    return rewards + keep(scores.astype(rewards.dtype).unsqueeze(1).expand_as(rewards), last)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (arXiv:1506.02438, eq. 11-16): ([B, T] advantages, [B, T] returns), no gradient.

    delta_t = r_t + gamma V_{t'} - V_t and A_t = delta_t + gamma lambda A_{t'}, where t' is the next valid token:
    masked positions are skipped, not stepped through. returns = A + V. Both are 0 where masked.

    ``bootstrap`` [B]: the value of the state after an answer's last token, 0 for an answer that ended. Default: 0 for
    all, also for answers cut at the length limit, because their score already judges the text as it stands.
    """
    valid = mask.numpy()
    reward = np.where(valid, rewards.numpy(), 0).astype(np.float64)
    value = np.where(valid, values.numpy(), 0).astype(np.float64)
    next_value = np.zeros(len(valid)) if bootstrap is None else bootstrap.numpy().astype(np.float64)
    next_advantage = np.zeros(len(valid))
    advantages = np.zeros_like(value)
    for t in reversed(range(valid.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        estimate = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = np.where(valid[:, t], estimate, 0)
        next_advantage = np.where(valid[:, t], estimate, next_advantage)
        next_value = np.where(valid[:, t], value[:, t], next_value)
    return tuple(paddle.to_tensor(x, dtype=values.dtype) for x in (advantages, advantages + value))


# ---- losses ---------------------------------------------------------------------------------------------------------


def _policy_stats(log_ratio: Tensor, mask: Tensor, clipped: Tensor | None, weight: Tensor | None) -> PolicyStats:
    with paddle.no_grad():
        log_ratio = log_ratio.detach().astype("float64")
        ratio, zero = log_ratio.exp(), paddle.zeros([], dtype="float64")
        return PolicyStats(
            tokens=mask.sum().astype("float64"),
            approxkl=sum_stat(0.5 * log_ratio * log_ratio, mask),
            clipped=zero if clipped is None else sum_stat(clipped, mask),
            ratio=sum_stat(ratio, mask),
            ratio_sq=sum_stat(ratio * ratio, mask),
            weight=zero if weight is None else sum_stat(weight, mask),
            weight_sq=zero if weight is None else sum_stat(weight.astype("float64") ** 2, mask),
        )


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range_ratio: float = 0.2,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7): mean of max(-A ratio, -A clip(ratio, 1 - c, 1 + c))."""
    log_ratio = keep(log_probs, mask) - keep(old_log_probs, mask)
    advantages, ratio = keep(advantages, mask), log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clip(1 - clip_range_ratio, 1 + clip_range_ratio)
    loss = masked_mean(paddle.maximum(unclipped, clipped), mask, denominator)
    return loss, _policy_stats(log_ratio, mask, clipped > unclipped, None)


def apa_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    anchor_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    apa_lambda: float = 0.1,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Advantage-induced policy alignment (arXiv:2306.02231): mean of (log_probs - anchor - A / lambda)^2.

    The anchor is the policy to stay near: the initial one in the paper. lambda = 1 / adv_coeff_sq of the authors'
    code; their advantages are whitened. ``old_log_probs`` only feeds the stats.
    """
    log_probs, old_log_probs = keep(log_probs, mask), keep(old_log_probs, mask)
    target = keep(anchor_log_probs, mask) + keep(advantages, mask) / apa_lambda
    loss = masked_mean((log_probs - target) ** 2, mask, denominator)
    return loss, _policy_stats(log_probs - old_log_probs, mask, None, None)


def awr_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    awr_beta: float = 1.0,
    weight_clip: float | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Advantage-weighted regression (arXiv:1910.00177): mean of -exp(A / beta) log_probs.

    The weight exp(A / beta) is cut at ``weight_clip`` and, always, at exp(30), so that neither the loss nor its
    gradient's norm overflows float32; stats.clipped counts the tokens cut. ``old_log_probs`` only feeds the stats.
    """
    log_probs, old_log_probs = keep(log_probs, mask), keep(old_log_probs, mask)
    exponent = keep(advantages, mask) / awr_beta
    ceiling = LARGEST_EXPONENT if weight_clip is None else min(math.log(weight_clip), LARGEST_EXPONENT)
    weight = exponent.clip(max=ceiling).exp().detach()
    loss = masked_mean(-weight * log_probs, mask, denominator)
    return loss, _policy_stats(log_probs - old_log_probs, mask, exponent > ceiling, weight)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range_value: float = 5.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    """Clipped value loss: mean of 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2); all [B, T]."""
    values, old_values, returns = (keep(x, mask) for x in (values, old_values, returns))
    moved = (values - old_values).clip(-clip_range_value, clip_range_value)
    near = paddle.where(moved == values - old_values, values, old_values + moved)  # exactly: rounding is no clipping
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * masked_mean(paddle.maximum(unclipped, clipped), mask, denominator)
    return loss, ValueStats(mask.sum().astype("float64"), sum_stat(clipped > unclipped, mask))
