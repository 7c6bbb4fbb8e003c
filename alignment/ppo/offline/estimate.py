"""From scores of logged answers to returns and advantages. Every rank computes the same on the whole data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from alignment.ppo import losses
from alignment.ppo.collect import as_tensors
from alignment.ppo.controllers import RunningMoments
from alignment.ppo.experience import Experience, Targets


class Estimator:
    """Targets of logged answers, on the scale of the training answers: their scores and advantages are standardised.

    Args: args: alignment.ppo.offline.arguments.TrainingArguments.
    """

    def __init__(self, args: Any) -> None:
        self.args, self.scores = args, RunningMoments()
        self.advantages = paddle.zeros([3], dtype="float64")  # masked_moments, before whitening

    def fit_scores(self, scores: np.ndarray) -> None:
        """Take the training answers' scores, float32 [N], as the scale of all; to be called once."""
        self.scores.update(losses.masked_moments(paddle.to_tensor(scores)))

    def fit(self, experience: Experience) -> tuple[Targets, dict[str, float]]:
        """``targets`` of the training answers, whose advantages become the scale of all."""
        _, advantages, mask = self._estimate(experience)
        self.advantages = losses.masked_moments(advantages, mask)
        return self.targets(experience)

    def targets(self, experience: Experience) -> tuple[Targets, dict[str, float]]:
        """Advantages and returns float32 [N, T], and how far the values of the experience are from the returns."""
        returns, advantages, mask = self._estimate(experience)
        values = paddle.to_tensor(experience.values)
        if self.args.normalize_advantage:
            advantages = losses.whiten(advantages, mask, self.advantages)
        moments = (losses.masked_moments(x, mask) for x in (returns, returns - values))
        metrics = {
            "value_loss": 0.5 * float(losses.masked_mean((values - returns) ** 2, mask)),
            "vf_explained_var": losses.explained_variance(*moments),
        }
        return Targets(advantages.numpy(), returns.numpy()), metrics

    def _estimate(self, experience: Experience) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """Returns, advantages (not whitened) and mask, [N, T] each.

        Each score is on its answer's last token. There is no KL penalty: who gave the answers is unknown. Returns are
        the discounted rewards to come as they were, free of the critic's errors.
        """
        args = self.args
        scores, values, mask = as_tensors(experience.scores, experience.values, experience.response_mask)
        scores = self.scores.normalize(scores) if args.normalize_reward else scores
        rewards = losses.token_rewards(scores, paddle.zeros(mask.shape), 0.0, mask, args.clip_range_score)
        returns = losses.gae(rewards, paddle.zeros_like(rewards), mask, args.gamma, gae_lambda=1.0)[1]
        return returns, losses.gae(rewards, values, mask, args.gamma, args.gae_lambda)[0], mask


def no_targets(experience: Experience) -> Targets:
    """All 0, for an objective that needs none."""
    zeros = np.broadcast_to(np.float32(0), experience.response_mask.shape)
    return Targets(zeros, zeros)
