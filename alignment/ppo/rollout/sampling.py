"""From logits to tokens: penalties, filters and inverse-CDF sampling. Pure functions on tensors."""
from __future__ import annotations

import paddle
import paddle.nn.functional as F

from alignment.ppo.rollout.protocol import BROKEN, SamplingParameters

LARGEST_ZERO = 1e-20  # Paddle's CPU softmax gives exp(-64) = 2e-28 where 0 is due: a million of those stay below this

NUCLEUS = 1024  # likeliest tokens that are nearly always enough for top_p, and cheaper to find than to sort all


def penalise_repetition(logits: paddle.Tensor, seen: paddle.Tensor, penalty: float) -> paddle.Tensor:
    """Make tokens that occur in the prompt or the answer so far less likely (Keskar et al. 2019, arXiv:1909.05858).

    Args: logits float [B, V]; seen bool [B, V], True for tokens that occurred; penalty > 1 discourages them.
    """
    return paddle.where(seen, paddle.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: paddle.Tensor, top_k: int) -> paddle.Tensor:
    """Set all but the ``top_k`` largest logits of each row ([B, V]) to -inf; ties with the k-th stay."""
    smallest_kept = paddle.topk(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    return paddle.where(logits < smallest_kept, paddle.full_like(logits, float("-inf")), logits)


def keep_top_p(logits: paddle.Tensor, top_p: float) -> paddle.Tensor:
    """Nucleus filter (Holtzman et al. 2020): keep the fewest tokens whose mass reaches ``top_p``, ties included."""
    probabilities = F.softmax(logits)
    ordered = paddle.topk(probabilities, min(NUCLEUS, logits.shape[-1]))[0]
    if bool((ordered.sum(-1) < top_p).any()):
        ordered = paddle.sort(probabilities, axis=-1, descending=True)
    before = paddle.cumsum(ordered, axis=-1) - ordered  # mass of all more likely tokens
    kept = (before < top_p).astype("int64").sum(-1, keepdim=True)
    threshold = paddle.take_along_axis(ordered, kept - 1, axis=-1)
    return paddle.where(probabilities < threshold, paddle.full_like(logits, float("-inf")), logits)


def sampling_logits(
    logits: paddle.Tensor, seen: paddle.Tensor | None, forbids_end: paddle.Tensor, sampling: SamplingParameters
) -> paddle.Tensor:
    """Apply everything that shapes the sampling distribution, in the order of transformers' processors.

    Args: logits float32 [B, V]; seen bool [B, V] or None without repetition penalty; forbids_end bool [B], True where
        the answer may not end yet.
    """
    if seen is not None:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.min_new_tokens > 1:
        ends = paddle.zeros([logits.shape[-1]], dtype="bool")
        ends[[token for token in sampling.eos_token_ids if token < len(ends)]] = True
        forbidden = forbids_end.unsqueeze(1) & ends
        logits = paddle.where(forbidden, paddle.full_like(logits, float("-inf")), logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def choose_tokens(logits: paddle.Tensor, uniform: paddle.Tensor, greedy: bool) -> paddle.Tensor:
    """Draw one token a row: the first whose cumulative probability exceeds ``uniform``.

    Args: logits float32 [B, V]; uniform float64 [B] in [0, 1). Returns int64 [B].
    The sum runs in float64: its rounding would otherwise shift the borders between tokens.
    """
    if greedy:
        return paddle.argmax(logits, axis=-1)
    cumulative = paddle.cumsum(F.softmax(logits, axis=-1).astype("float64"), axis=-1)
    target = (uniform.unsqueeze(-1) * cumulative[:, -1:]).clip(min=LARGEST_ZERO)
    return paddle.searchsorted(cumulative, target, right=True).squeeze(-1)


def mark_broken(tokens: paddle.Tensor, logits: paddle.Tensor) -> paddle.Tensor:
    """BROKEN in place of each token, int64 [B], whose logits [B, V] hold NaN or inf: what was drawn means nothing."""
    sound = (logits < float("inf")).all(-1)
    return paddle.where(sound, tokens, paddle.full_like(tokens, BROKEN))
