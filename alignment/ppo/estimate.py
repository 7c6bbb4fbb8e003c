"""From experience to targets: shaped rewards, advantages, returns. Every rank computes the same on the whole."""
from __future__ import annotations

import numpy as np

from alignment.ppo import losses
from alignment.ppo.collect import as_tensors
from alignment.ppo.experience import Experience, Targets


def estimate(experience: Experience, args, controller, moments) -> tuple[Targets, dict[str, float]]:
    """Score -> token rewards -> GAE -> targets, with the metrics that describe them.

    Args:
        args: PPO's TrainingArguments.
        controller: KL controller; its coefficient is used, then updated with this batch's KL.
        moments: running moments of the scores, used and updated if ``normalize_reward``.
    """
    log_probs, ref_log_probs, values, mask, finished, scores = as_tensors(
        experience.log_probs,
        experience.ref_log_probs,
        experience.values,
        experience.response_mask,
        experience.finished,
        experience.scores,
    )
    clip = args.clip_range_score
    scores = losses.penalize_missing_eos(scores, finished, args.missing_eos_penalty)
    shaped = moments.scale(scores) if args.normalize_reward else scores
    kl = losses.kl_estimate(log_probs, ref_log_probs, mask, args.kl_estimator)
    rewards = losses.token_rewards(shaped, kl, controller.coefficient, mask, clip)
    advantages, returns = losses.gae(rewards, values, mask, args.gamma, args.gae_lambda)
    explained = losses.explained_variance(
        losses.masked_moments(returns, mask), losses.masked_moments(returns - values, mask)
    )
    targets = Targets(
        advantages=(losses.whiten(advantages, mask) if args.normalize_advantage else advantages).numpy(),
        returns=returns.numpy(),
    )
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
    controller.update(metrics["objective/kl"], len(experience))
    return targets, metrics


def describe_rollout(experience: Experience) -> dict[str, float]:
    """Rewards and lengths of a batch of answers."""
    return {
        "rollout/reward_mean": float(experience.scores.mean()),
        "rollout/reward_std": float(experience.scores.std(ddof=1)) if len(experience) > 1 else 0.0,
        "rollout/length_mean": float(experience.lengths.mean()),
        "rollout/truncated_rate": float(1.0 - experience.finished.mean()),
    }


def mean_and_sem(values: np.ndarray) -> tuple[float, float]:
    """Mean of float [N] and its standard error (0 for a single value)."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def sequence_kl(experience: Experience) -> np.ndarray:
    """float32 [N]: unbiased estimate (k1) of each answer's KL to the reference, in nats, summed over its tokens."""
    return np.where(experience.response_mask, experience.log_probs - experience.ref_log_probs, 0.0).sum(-1)
