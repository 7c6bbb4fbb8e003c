"""Equality to the formulas of APA's authors where those are right, and negative controls where they are not.

The formulas are those of microsoft/RLHF-APA (commit cfe7da2), written anew in NumPy: c_sq = 1 / apa_lambda and
c_log = 1 / awr_beta, padding multiplied by the mask, n = sum(mask). Where mask and padding agree, so must the losses.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.ppo import losses
from alignment.ppo.controllers import AdaptiveKLController, RunningMoments

batches = st.tuples(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=5))


def f64(x) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(x, np.float64))


def make_batch(seed: int, lengths: list[int], width: int = 6) -> tuple[list[np.ndarray], np.ndarray]:
    """Four [B, T]: log-probabilities, two sets near them, advantages; finite padding, as the authors need."""
    random = np.random.default_rng(seed)
    x = random.normal(-1, 0.5, (len(lengths), width))
    fields = [x, *(x + random.normal(0, 0.4, x.shape) for _ in range(2)), random.normal(0, 1, x.shape)]
    return fields, np.arange(width) < np.array(lengths)[:, None]


# ---- the authors' formulas ------------------------------------------------------------------------------------------


def square_loss(log_probs, advantages, initial, mask, c_sq):
    return (((log_probs - c_sq * advantages - initial) * mask) ** 2).sum() / mask.sum()


def log_loss(log_probs, advantages, mask, c_log):
    return (-log_probs * np.exp(c_log * advantages) * mask).sum() / mask.sum()


def clipped_loss(log_probs, old, advantages, mask, epsilon):
    ratio = np.exp((log_probs - old) * mask)
    terms = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - epsilon, 1 + epsilon))
    return (terms * mask).sum() / mask.sum()


def critic_loss(values, returns, mask):
    return 0.5 * ((values - returns) ** 2 * mask).sum() / mask.sum()


def clipped_critic_loss(values, old, returns, mask, epsilon):
    clipped = np.clip(values, old - epsilon, old + epsilon)
    return 0.5 * (np.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / mask.sum()


def advantages_and_returns(values, rewards, gamma, gae_lambda):
    last, reverse = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * gae_lambda * last
        reverse.append(last)
    advantages = np.stack(reverse[::-1], axis=1)
    return advantages, advantages + values


def whitened(x):
    return (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8)


# ---- equal ----------------------------------------------------------------------------------------------------------


class TestLosses:
    @given(batch=batches, c_sq=st.sampled_from([1.0, 10.0]), c_log=st.sampled_from([0.5, 1.0]))
    def test_equal_on_equal_masks(self, batch, c_sq, c_log):
        (new, old, initial, advantages), mask = make_batch(*batch)
        x, o, i, a, m = f64(new), f64(old), f64(initial), f64(advantages), paddle.to_tensor(mask)
        pairs = [
            (losses.apa_loss(x, o, i, a, m, 1 / c_sq), square_loss(new, advantages, initial, mask, c_sq)),
            (losses.awr_loss(x, o, a, m, 1 / c_log), log_loss(new, advantages, mask, c_log)),
            (losses.ppo_loss(x, o, a, m, 0.2), clipped_loss(new, old, advantages, mask, 0.2)),
            (losses.value_loss(x, o, i, m, 0.2), clipped_critic_loss(new, old, initial, mask, 0.2)),
            (losses.value_loss(x, o, i, m, 100.0), critic_loss(new, initial, mask)),  # their APA and AWR: no clipping
        ]
        for (ours, _), theirs in pairs:
            assert ours.item() == pytest.approx(theirs, rel=1e-9, abs=1e-12)

    @given(seed=st.integers(0, 2**31), gae_lambda=st.sampled_from([0.0, 0.95, 1.0]))
    def test_advantages_and_whitening_are_equal_without_padding(self, seed, gae_lambda):
        (values, rewards, _, _), mask = make_batch(seed, [6, 6, 6])
        m = paddle.to_tensor(mask)
        advantages, returns = losses.gae(f64(rewards), f64(values), m, 1.0, gae_lambda)
        expected = advantages_and_returns(values, rewards, 1.0, gae_lambda)
        np.testing.assert_allclose(advantages.numpy(), expected[0], atol=1e-12)
        np.testing.assert_allclose(returns.numpy(), expected[1], atol=1e-12)
        np.testing.assert_allclose(losses.whiten(advantages, m).numpy(), whitened(expected[0]), atol=1e-9)

    def test_scores_over_their_running_deviation(self):
        moments, seen = RunningMoments(), []
        for batch in np.random.default_rng(0).normal(2, 3, (4, 5)):
            seen.extend(batch)
            moments.update(losses.masked_moments(f64(batch)))
            assert moments.std == pytest.approx(np.std(seen, ddof=1))

    def test_the_adaptive_kl_controller(self):
        controller, theirs = AdaptiveKLController(0.05, 6.0, 10000.0), 0.05
        for kl in (3.0, 5.9, 6.5, 40.0):
            controller.update(kl, 8)
            theirs *= 1 + np.clip(kl / 6.0 - 1, -0.2, 0.2) * 8 / 10000
            assert controller.coefficient == pytest.approx(theirs, rel=1e-12)


# ---- different on purpose -------------------------------------------------------------------------------------------


class TestDifferentOnPurpose:
    def test_nothing_is_learnt_after_a_cut_answer(self):
        # Their mask is that of states, so the longest answer of a chunk gains an invented EOS once it stands beside a
        # longer one; its stored anchor is the padding's 0, a probability of 1. Here it has no such action.
        new, initial, advantages = [[-1.0, -2.0, -5.0]], [[-1.1, -2.2, 0.0]], [[0.01, -0.02, 0.0]]
        theirs = square_loss(*(np.array(x) for x in (new, advantages, initial)), np.array([[1, 1, 1]]), 10.0)
        mask = paddle.to_tensor([[True, True, False]])
        ours, _ = losses.apa_loss(f64(new), f64(new), f64(initial), f64(advantages), mask, 0.1)
        assert ours.item() == pytest.approx((0.0**2 + 0.4**2) / 2, abs=1e-12)
        assert theirs == pytest.approx((0.4**2 + 5.0**2) / 3)

    def test_padding_is_not_whitened(self):
        # Theirs spreads over the padded tensor: zeros of padding move the mean and shrink the deviation.
        x, mask = np.array([[1.0, 3.0, 0.0, 0.0, 0.0, 0.0]]), np.array([[1, 1, 0, 0, 0, 0]], bool)
        ours = losses.whiten(f64(x), paddle.to_tensor(mask)).numpy()[mask]
        np.testing.assert_allclose(ours, [-(0.5**0.5), 0.5**0.5])
        assert (whitened(x)[mask] > 0).all()

    def test_whitening_one_answer_at_a_time_loses_which_answer_was_better(self):
        # Theirs with a minibatch of one (6B and 20B): of two answers, one worth 3 more, both whiten to the same.
        advantages, mask = np.array([[-2.0, -1.0, -1.5], [1.0, 2.0, 1.5]]), np.ones((2, 3), bool)
        alone = [whitened(row) for row in advantages]
        np.testing.assert_allclose(*alone, atol=1e-12)
        together = losses.whiten(f64(advantages), paddle.to_tensor(mask)).numpy()
        assert together[0].max() < together[1].min()

    def test_their_weights_overflow(self):
        advantages = np.array([[800.0]])
        with np.errstate(over="ignore"):
            assert np.isinf(log_loss(np.array([[-1.0]]), advantages, np.array([[1]]), 1.0))
        loss, stats = losses.awr_loss(f64([[-1.0]]), f64([[-1.0]]), f64(advantages), paddle.to_tensor([[True]]))
        assert np.isfinite(loss.item()) and stats.clipped.item() == 1
