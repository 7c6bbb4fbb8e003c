"""What the objectives converge to when each iteration samples anew: all answers enumerated, values exact.

With samples of the policy itself (mu = pi) the gradients are, before any clipping, those of
    PPO   -E[score]; with kl_coeff in the reward: of -(E[score] - kl_coeff KL(pi || ref)), KL of whole answers
    APA   2 KL(pi || anchor exp(A / lambda)), state by state: the normaliser, and any baseline, drops out
so PPO stops at ref exp(score / kl_coeff) / Z over answers. APA stops where pi = anchor exp(Q / lambda) / Z in every
state, Q being pi's own. KL in the reward adds: in a single step the temperature is lambda + kl_coeff.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from alignment.ppo import losses
from tests.models.tiny import log_softmax
from tests.ppo.answer_tree import (
    AnswerTree,
    TabularPolicy,
    action_values,
    build_tree,
    expected_loss,
    random_policy,
    regularised_policy,
    tilt,
)

TREE = build_tree(length=2)  # 7 answers
INITIAL = random_policy(TREE)
ONE_TOKEN = build_tree(vocab=4, length=1, seed=3, spread=0.5)


def ppo(new, old, anchor, advantages, mask, n):
    return losses.ppo_loss(new, old, advantages, mask, 0.2, n)


def apa(apa_lambda: float, anchored_to_old: bool = False):
    def loss(new, old, anchor, advantages, mask, n):
        return losses.apa_loss(new, old, old if anchored_to_old else anchor, advantages, mask, apa_lambda, n)

    return loss


def awr(awr_beta: float):
    def loss(new, old, anchor, advantages, mask, n):
        return losses.awr_loss(new, old, advantages, mask, awr_beta, None, n)

    return loss


def estimate(tree: AnswerTree, log_pi: np.ndarray, log_ref: np.ndarray, kl_coeff: float) -> np.ndarray:
    """Advantages [N, T] as the trainer makes them from an exact critic; lambda 0 is then exact for every sample."""
    _, values = action_values(tree, log_pi, log_ref, kl_coeff)
    old, ref = (paddle.to_tensor(tree.of_answers(table)) for table in (log_pi, log_ref))
    scores, mask = paddle.to_tensor(tree.scores), paddle.to_tensor(tree.mask)
    rewards = losses.token_rewards(scores, losses.kl_estimate(old, ref, mask, "k1"), kl_coeff, mask)
    return losses.gae(rewards, paddle.to_tensor(values[tree.states]), mask, 1.0, 0.0)[0].numpy()


def loss_of_samples(loss, policy: TabularPolicy, log_ref: np.ndarray, kl_coeff: float):
    """The expected loss over samples of the policy as it is now, to be evaluated as the policy moves on."""
    tree, log_pi = policy.tree, policy.table()
    weights, old, ref = tree.probabilities(log_pi), tree.of_answers(log_pi), tree.of_answers(log_ref)
    advantages = estimate(tree, log_pi, log_ref, kl_coeff)
    return lambda: expected_loss(loss, weights, tree.mask, policy.log_probs(), old, ref, advantages)


def iterate(loss, tree: AnswerTree, log_ref: np.ndarray, kl_coeff: float, iterations: int, passes: int = 1):
    """The policy [S, V] after so many iterations from log_ref, each of so many optimizer steps."""
    policy = TabularPolicy(tree, log_ref)
    decay = paddle.optimizer.lr.CosineAnnealingDecay(0.1, iterations)
    optimizer = paddle.optimizer.Adam(decay, beta1=0.5, beta2=0.9, parameters=[policy.logits])
    for _ in range(iterations):
        objective = loss_of_samples(loss, policy, log_ref, kl_coeff)
        for _ in range(passes):
            objective().backward()
            optimizer.step()
            optimizer.clear_grad()
        decay.step()
    return policy.table()


def gradient(loss, log_pi: np.ndarray, log_ref: np.ndarray, kl_coeff: float = 0.0) -> np.ndarray:
    policy = TabularPolicy(TREE, log_pi)
    loss_of_samples(loss, policy, log_ref, kl_coeff)().backward()
    return policy.logits.grad.numpy()


def differences(objective, log_pi: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient with respect to logits, by central differences."""
    result = np.zeros_like(log_pi)
    for at in np.ndindex(*log_pi.shape):
        moved = [log_pi.copy(), log_pi.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        result[at] = (objective(log_softmax(moved[0])) - objective(log_softmax(moved[1]))) / (2 * step)
    return result


class TestGradientOnOwnSamples:
    PI = random_policy(TREE, seed=8)

    @pytest.mark.parametrize("kl_coeff", [0.0, 0.3])
    def test_of_ppo_is_the_policy_gradient_of_score_less_kl(self, kl_coeff):
        def objective(log_pi: np.ndarray) -> float:
            kl = TREE.of_answers(log_pi - INITIAL).sum(-1)
            return TREE.probabilities(log_pi) @ (TREE.scores - kl_coeff * kl)

        got = gradient(ppo, self.PI, INITIAL, kl_coeff)
        np.testing.assert_allclose(got, -differences(objective, self.PI), atol=1e-8)

    def test_of_apa_is_that_of_the_kl_to_its_target(self):
        advantages, _ = action_values(TREE, self.PI)
        visits = TREE.visits(self.PI)

        def objective(log_pi: np.ndarray) -> float:  # states and advantages stay those of the samples
            return visits @ (np.exp(log_pi) * (log_pi - INITIAL - advantages / 0.5)).sum(-1)

        got = gradient(apa(0.5), self.PI, INITIAL)
        np.testing.assert_allclose(got, 2 * differences(objective, self.PI), atol=1e-8)

    def test_of_apa_at_its_anchor_and_of_awr_at_a_large_beta_are_ppos(self):
        # 2 / lambda and, to the first order, 1 / beta times the policy gradient
        expected = gradient(ppo, self.PI, self.PI)
        np.testing.assert_allclose(gradient(apa(0.5), self.PI, self.PI), 2 / 0.5 * expected, atol=1e-10)
        np.testing.assert_allclose(gradient(apa(0.5, True), self.PI, INITIAL), 2 / 0.5 * expected, atol=1e-10)
        np.testing.assert_allclose(1e5 * gradient(awr(1e5), self.PI, self.PI), expected, atol=1e-4)


class TestPpo:
    def test_without_kl_it_becomes_greedy(self):
        reached = TREE.probabilities(iterate(ppo, TREE, INITIAL, 0.0, 150, passes=2))
        assert reached[TREE.scores.argmax()] > 0.999

    def test_with_kl_in_the_reward_it_is_the_closed_form_of_answers(self):
        reached = TREE.of_answers(iterate(ppo, TREE, INITIAL, 0.5, 150, passes=2)).sum(-1)
        expected = log_softmax(TREE.of_answers(INITIAL).sum(-1) + TREE.scores / 0.5)
        np.testing.assert_allclose(reached, expected, atol=1e-3)


class TestApa:
    def test_it_stays_near_its_anchor_without_kl_in_the_reward(self):
        reached = iterate(apa(0.7), TREE, INITIAL, 0.0, 150)
        np.testing.assert_allclose(reached, regularised_policy(TREE, INITIAL, 0.7, 0.0), atol=1e-3)
        # which forgets the KL of later tokens: over answers it is not the closed form
        assert np.abs(reached - regularised_policy(TREE, INITIAL, 0.7, 0.7)).max() > 0.05

    def test_with_kl_in_the_reward_the_temperatures_add(self):
        reached = iterate(apa(0.4), TREE, INITIAL, 0.3, 150)
        np.testing.assert_allclose(reached, regularised_policy(TREE, INITIAL, 0.7, 0.3), atol=1e-3)
        start = random_policy(ONE_TOKEN)
        reached = iterate(apa(0.4), ONE_TOKEN, start, 0.3, 150)
        np.testing.assert_allclose(reached, tilt(start, ONE_TOKEN.scores[None], 0.7), atol=1e-3)

    def test_anchored_to_the_old_policy_only_kl_in_the_reward_holds_it(self):
        reached = iterate(apa(0.7, anchored_to_old=True), TREE, INITIAL, 0.5, 150, passes=2)
        np.testing.assert_allclose(reached, regularised_policy(TREE, INITIAL, 0.5, 0.5), atol=1e-3)
        free = TREE.probabilities(iterate(apa(0.7, anchored_to_old=True), TREE, INITIAL, 0.0, 150, passes=2))
        assert free[TREE.scores.argmax()] > 0.999

    @pytest.mark.parametrize(("spread", "steady"), [(0.7, True), (4.0, False)])
    def test_reused_samples_hold_it_there_up_to_a_kl_of_one(self, spread, steady):
        # With samples of pi* itself and advantages of zero mean, the curvature of the loss in log pi along
        # probability-preserving directions is 2 pi (1 - KL(pi* || anchor)): beyond 1 nat a token further passes over
        # the same samples lead away from the closed form.
        tree = build_tree(vocab=4, length=1, seed=3, spread=spread)
        start = random_policy(tree)
        target = tilt(start, tree.scores[None], 1.0)
        kl = float((np.exp(target) * (target - start)).sum())
        assert (kl < 1) == steady
        policy = TabularPolicy(tree, target)
        objective = loss_of_samples(apa(1.0), policy, start, 0.0)
        at_target = float(objective())
        for direction in np.random.default_rng(0).normal(0, 1, (5, 1, 4)):
            ends = []
            for sign in (1, -1):
                paddle.assign(paddle.to_tensor(target + sign * 1e-3 * direction), policy.logits)
                ends.append(float(objective()))
            centred = direction - (np.exp(target) * direction).sum()
            expected = 2 * (1 - kl) * (np.exp(target) * centred**2).sum()
            assert (sum(ends) - 2 * at_target) / 1e-6 == pytest.approx(expected, rel=1e-3)


class TestAwr:
    def test_without_kl_each_iteration_divides_the_temperature(self):
        # exact iterations pi <- pi exp(A / beta) / Z: after k the policy is ref exp(k score / beta) / Z
        start = log_pi = random_policy(ONE_TOKEN)
        for _ in range(5):
            log_pi = tilt(log_pi, action_values(ONE_TOKEN, log_pi)[0], 2.0)
        np.testing.assert_allclose(log_pi, tilt(start, ONE_TOKEN.scores[None], 2.0 / 5), atol=1e-12)
        free = TREE.probabilities(iterate(awr(2.0), TREE, INITIAL, 0.0, 150, passes=2))
        assert free[TREE.scores.argmax()] > 0.999

    def test_with_kl_in_the_reward_it_stops_where_ppo_does(self):
        reached = iterate(awr(1.0), TREE, INITIAL, 0.5, 150, passes=2)
        np.testing.assert_allclose(reached, regularised_policy(TREE, INITIAL, 0.5, 0.5), atol=1e-3)
