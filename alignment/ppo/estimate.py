"""From experience to targets: shaped rewards, advantages, returns. Every rank computes the same on the whole."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from alignment.parallel.topology import topology
from alignment.ppo import losses
from alignment.ppo.collect import as_tensors
from alignment.ppo.controllers import AdaptiveKLController, FixedKLController, ScoreScaler
from alignment.ppo.experience import Experience, Targets
from alignment.training.batches import deal

REPEATED_TOKENS = 4  # as is usual: shorter runs of tokens come again in good prose too


def estimate(
    experience: Experience,
    args: Any,
    controller: FixedKLController | AdaptiveKLController,
    scaler: ScoreScaler,
    reference_scores: np.ndarray | None = None,
) -> tuple[Targets, dict[str, float]]:
    """Score -> token rewards -> GAE -> targets, with the metrics that describe them.

    Args:
        args: PPO's TrainingArguments.
        controller: its coefficient is used, then updated with this batch's KL.
        scaler: scales the scores, and takes them in.
        reference_scores: float32 [N], taken off the scores first; None: nothing is.
    """
    log_probs, ref_log_probs, values, mask, finished, scores = as_tensors(
        experience.log_probs,
        experience.ref_log_probs,
        experience.values,
        experience.response_mask,
        experience.finished,
        experience.scores if reference_scores is None else experience.scores - reference_scores,
    )
    clip = args.clip_range_score
    scores = losses.penalize_missing_eos(scores, finished, args.missing_eos_penalty)
    shaped = scaler.scale(scores)
    kl = losses.kl_estimate(log_probs, ref_log_probs, mask, args.kl_estimator)
    rewards = losses.token_rewards(shaped, kl, controller.coefficient, mask, clip)
    advantages, returns = losses.gae(rewards, values, mask, args.gamma, args.gae_lambda)
    explained = losses.explained_variance(
        losses.masked_moments(returns, mask), losses.masked_moments(returns - values, mask)
    )
    if args.normalize_advantage:
        advantages = whiten_advantages(advantages, mask, args.whitening_scope)
    sequence_kl = losses.kl_estimate(log_probs, ref_log_probs, mask, "k1").sum(-1)
    non_score = -controller.coefficient * kl.sum(-1)
    metrics = {
        "objective/kl": float(sequence_kl.mean()),
        "objective/kl_coeff": controller.coefficient,
        "objective/entropy": float(np.where(experience.response_mask, experience.entropy, 0.0).sum(-1).mean()),
        "objective/non_score_reward": float(non_score.mean()),
        "objective/scores": float(scores.mean()),
        "objective/rlhf_reward": float((shaped.clip(-clip, clip) + non_score).mean()),
        "critic/vf_explained_var": explained,
        "val/num_eos_tokens": float(experience.finished.sum()),
        **describe_rollout(experience),
    }
    if reference_scores is not None:
        metrics["objective/reference_scores"] = float(reference_scores.mean())
    controller.update(metrics["objective/kl"], len(experience))
    return Targets(advantages=advantages.numpy(), returns=returns.numpy()), metrics


def whiten_advantages(advantages: paddle.Tensor, mask: paddle.Tensor, scope: str) -> paddle.Tensor:
    """Whitened advantages [N, T]: over all answers ("batch"), or over each data-parallel share of them ("rank").

    Shares are dealt by length, as minibatches are (alignment.training.batches.deal).
    """
    if scope == "batch":
        return losses.whiten(advantages, mask)
    whitened, lengths, count = paddle.zeros_like(advantages), mask.sum(-1).tolist(), topology().data_size
    for index in range(min(count, len(lengths))):
        rows = paddle.to_tensor(deal(range(len(lengths)), lengths.__getitem__, index, count))
        part = losses.whiten(advantages[rows], mask[rows])
        whitened = paddle.scatter(whitened, rows, part)
    return whitened


def describe_rollout(experience: Experience) -> dict[str, float]:
    """Rewards, lengths and repetition of a batch of answers."""
    answers = zip(experience.response_ids, experience.response_mask, strict=True)
    return {
        "rollout/reward_mean": float(experience.scores.mean()),
        "rollout/reward_std": float(experience.scores.std(ddof=1)) if len(experience) > 1 else 0.0,
        "rollout/length_mean": float(experience.lengths.mean()),
        "rollout/truncated_rate": float(1.0 - experience.finished.mean()),
        "rollout/repetition_rate": float(np.mean([repetition_rate(ids[mask].tolist()) for ids, mask in answers])),
    }


def repetition_rate(tokens: Sequence[int]) -> float:
    """Share of an answer's n-grams (n = REPEATED_TOKENS) that stood in it before; 0 for one shorter than that.

    1 - distinct / all: 0 where nothing is said twice, near 1 for a loop.
    """
    grams = list(zip(*(tokens[start:] for start in range(REPEATED_TOKENS)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def mean_and_sem(values: np.ndarray) -> tuple[float, float]:
    """Mean of float [N] and its standard error (0 for a single value)."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def sequence_kl(experience: Experience) -> np.ndarray:
    """float32 [N]: unbiased estimate (k1) of each answer's KL to the reference, in nats, summed over its tokens."""
    return np.where(experience.response_mask, experience.log_probs - experience.ref_log_probs, 0.0).sum(-1)
