"""ILQL's loss: hand-worked numbers, a loop in NumPy as an independent reference, finite differences, properties."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.ppo import losses
from alignment.ppo.offline import ilql_losses
from alignment.ppo.offline.ilql_losses import ActionValues, ilql_loss

SCALES = {"tau": 0.7, "gamma": 0.9, "cql_scale": 0.3, "awac_scale": 0.5, "beta": 0.8}
TRAINED = ("log_probs", "q_1", "q_2", "q_1_log_probs", "q_2_log_probs", "values")
batches = st.tuples(st.integers(0, 2**31), st.lists(st.integers(0, 6), min_size=1, max_size=5))


def make_batch(seed: int, lengths: list[int], width: int = 6) -> tuple[ActionValues, np.ndarray, np.ndarray]:
    """float64 values of every field, rewards at every token, and the mask."""
    random = np.random.default_rng(seed)
    fields = [random.normal(0, 1, (len(lengths), width)) for _ in range(8)]
    return ActionValues(*fields[:7]), fields[7], np.arange(width) < np.array(lengths)[:, None]


def run(actions: ActionValues, rewards, mask, denominator=None, dtype="float64", **scales):
    """Loss, gradients by field, stats."""
    tensors = ActionValues(*(paddle.to_tensor(x, dtype=dtype) for x in actions))
    for x in tensors:
        x.stop_gradient = False
    rewards, mask = paddle.to_tensor(rewards, dtype=dtype), paddle.to_tensor(mask)
    loss, stats = ilql_loss(tensors, rewards, mask, **SCALES | scales, denominator=denominator)
    loss.backward()
    grads = {name: np.zeros(mask.shape) if x.grad is None else x.grad.numpy()
             for name, x in tensors._asdict().items()}  # fmt: skip
    return loss.item(), grads, stats


def reference(actions: ActionValues, rewards, mask, following=None, fixed=None) -> float:
    """The sum of all terms, token by token. following, fixed: V' and (Q_target, V) of AWAC held at other values."""
    total, fixed = 0.0, fixed or actions
    for i in range(len(mask)):
        steps = [t for t in range(mask.shape[1]) if mask[i, t]]
        for number, t in enumerate(steps):
            v_next = (following or actions).values[i, steps[number + 1]] if number + 1 < len(steps) else 0.0
            y = rewards[i, t] + SCALES["gamma"] * v_next
            u = actions.target_q[i, t] - actions.values[i, t]
            weight = math.exp(SCALES["beta"] * (fixed.target_q[i, t] - fixed.values[i, t]))
            total += (actions.q_1[i, t] - y) ** 2 + (actions.q_2[i, t] - y) ** 2
            total += (SCALES["tau"] if u >= 0 else 1 - SCALES["tau"]) * u * u
            total -= SCALES["cql_scale"] * (actions.q_1_log_probs[i, t] + actions.q_2_log_probs[i, t])
            total -= SCALES["awac_scale"] * weight * actions.log_probs[i, t]
    return total


class TestHandWorked:
    def test_two_tokens(self):
        # r = 0, 1; V = 0.5, 2; gamma 0.5: targets y = 0 + 0.5 * 2 = 1 and 1 + 0 = 1.
        # td: (2 - 1)^2 + (0 - 1)^2 = 2 and (1 - 1)^2 + (3 - 1)^2 = 4.
        # expectile, tau 0.8: u = 1.5 - 0.5 = 1: 0.8; u = 1 - 2 = -1: 0.2.
        # cql: 1 + 2 = 3 and 0.5 + 0.5 = 1. awac, beta ln 3: 3^1 * 1 = 3 and 3^-1 * 3 = 1.
        # loss = (6 + 1 + 0.1 * 4 + 0.5 * 4) / 2 = 4.7
        rows = {"log_probs": [-1, -3], "q_1": [2, 1], "q_2": [0, 3], "q_1_log_probs": [-1, -0.5],
                "q_2_log_probs": [-2, -0.5], "target_q": [1.5, 1], "values": [0.5, 2]}  # fmt: skip
        actions = ActionValues(**{name: np.array([row], np.float64) for name, row in rows.items()})
        scales = {"tau": 0.8, "gamma": 0.5, "cql_scale": 0.1, "awac_scale": 0.5, "beta": math.log(3)}
        loss, grads, stats = run(actions, [[0.0, 1.0]], [[True, True]], **scales)
        assert loss == pytest.approx(4.7)
        np.testing.assert_allclose(grads["q_1"], [[1, 0]])  # 2 (Q - y) / 2
        np.testing.assert_allclose(grads["q_2"], [[-1, 2]])
        np.testing.assert_allclose(grads["values"], [[-0.8, 0.2]])  # -2 share u / 2, and none through y or the weight
        np.testing.assert_allclose(grads["target_q"], [[0, 0]])
        np.testing.assert_allclose(grads["q_1_log_probs"], [[-0.05, -0.05]])
        np.testing.assert_allclose(grads["log_probs"], [[-0.75, -1 / 12]])  # -0.5 weight / 2
        expected = {"tokens": 2, "td": 6, "expectile": 1, "cql": 4, "awac": 4, "q": 3, "target_q": 2.5, "values": 2.5,
                    "weight": 10 / 3, "weight_sq": 82 / 9, "clipped": 0}  # fmt: skip
        assert {name: value.item() for name, value in stats._asdict().items()} == pytest.approx(expected)

    def test_next_value_skips_masked_tokens_and_ends_with_the_answer(self):
        values = paddle.to_tensor([[1.0, math.nan, 3.0, 4.0], [5.0, 6.0, math.nan, math.nan], [math.inf] * 4])
        mask = paddle.to_tensor([[True, False, True, True], [True, True, False, False], [False] * 4])
        found = ilql_losses.next_values(values, mask).numpy()
        np.testing.assert_array_equal(found, [[3, 0, 4, 0], [6, 0, 0, 0], [0, 0, 0, 0]])

    @pytest.mark.parametrize(("tau", "expected"), [(0.5, 2.0), (0.9, 3.0)])
    def test_the_expectile_term_is_least_at_the_expectile(self, tau, expected):
        # of 0 and 4 (equally often): tau (4 - v) = (1 - tau) v at v = 4 tau; of 0, 2, 4 and tau 0.9: from
        # 0.9 (4 - v) = 0.1 (v + v - 2) follows v = 38 / 11
        outcomes = paddle.to_tensor([0.0, 4.0], dtype="float64")
        v = paddle.to_tensor([4 * tau] * 2, dtype="float64", stop_gradient=False)
        ilql_losses.expectile_terms(v, outcomes, tau).sum().backward()
        assert v.grad.sum().item() == pytest.approx(0, abs=1e-12)
        v = paddle.to_tensor([38 / 11] * 3, dtype="float64", stop_gradient=False)
        ilql_losses.expectile_terms(v, paddle.to_tensor([0.0, 2.0, 4.0], dtype="float64"), 0.9).sum().backward()
        assert v.grad.sum().item() == pytest.approx(0, abs=1e-12)

    def test_no_action_at_all(self):
        actions, rewards, mask = make_batch(0, [0, 0])
        loss, grads, stats = run(actions, rewards, mask)
        assert loss == 0 and stats.tokens.item() == 0
        assert all((grad == 0).all() for grad in grads.values())


class TestAwacTerm:
    def test_is_awr_on_the_advantage(self):
        actions, rewards, mask = make_batch(3, [4, 2])
        loss, grads, _ = run(actions, rewards, mask, awac_scale=1.0, beta=2.0)
        without, _, _ = run(actions, rewards, mask, awac_scale=0.0)
        log_probs = paddle.to_tensor(actions.log_probs, stop_gradient=False)
        advantages = paddle.to_tensor(actions.target_q - actions.values)
        expected, _ = losses.awr_loss(log_probs, log_probs.detach(), advantages, paddle.to_tensor(mask), 1 / 2.0)
        expected.backward()
        assert loss - without == pytest.approx(expected.item())
        np.testing.assert_allclose(grads["log_probs"], log_probs.grad.numpy())

    def test_without_beta_is_behaviour_cloning(self):
        actions, rewards, mask = make_batch(4, [6, 1, 3])
        loss, _, stats = run(actions, rewards, mask, awac_scale=1.0, beta=0.0)
        without, _, _ = run(actions, rewards, mask, awac_scale=0.0)
        assert loss - without == pytest.approx(-actions.log_probs[mask].mean())
        assert stats.weight.item() == stats.tokens.item() == 10

    def test_overflow_stays_finite_and_is_counted(self):
        # exp(8 * 1000) overflows any float; the authors' code returns inf, then NaN.
        actions, rewards, mask = make_batch(0, [3])
        actions = actions._replace(target_q=np.array([[1000.0, 0, -1000, 0, 0, 0]]))
        loss, grads, stats = run(actions, rewards, mask, beta=8.0, dtype="float32")
        assert math.isfinite(loss) and all(np.isfinite(grad).all() for grad in grads.values())
        assert stats.clipped.item() == 1 and math.isfinite(stats.weight_sq.item())


class TestReference:
    @given(batch=batches)
    def test_equals_the_loop(self, batch):
        actions, rewards, mask = make_batch(*batch)
        expected = reference(actions, rewards, mask) / max(mask.sum(), 1)
        assert run(actions, rewards, mask)[0] == pytest.approx(expected, rel=1e-9, abs=1e-12)

    @given(batch=batches)
    def test_gradients_are_finite_differences(self, batch):
        actions, rewards, mask = make_batch(*batch)
        _, grads, _ = run(actions, rewards, mask)
        count = max(mask.sum(), 1)
        for name in TRAINED:
            for i, t in zip(*np.nonzero(mask), strict=True):
                sides = []
                for step in (1e-6, -1e-6):
                    moved = getattr(actions, name).copy()
                    moved[i, t] += step
                    changed = actions._replace(**{name: moved})
                    sides.append(reference(changed, rewards, mask, following=actions, fixed=actions))
                expected = (sides[0] - sides[1]) / 2e-6 / count
                assert grads[name][i, t] == pytest.approx(expected, rel=1e-4, abs=1e-6), name

    @given(batch=batches, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -100.0]))
    def test_padding_never_counts(self, batch, garbage):
        actions, rewards, mask = make_batch(*batch)
        loss, grads, stats = run(actions, rewards, mask)
        spoilt = ActionValues(*(np.where(mask, x, garbage) for x in actions))
        again, spoilt_grads, spoilt_stats = run(spoilt, np.where(mask, rewards, garbage), mask)
        assert again == loss
        for name, grad in grads.items():
            np.testing.assert_array_equal(spoilt_grads[name], grad)
            assert (grad[~mask] == 0).all()
        assert [s.item() for s in spoilt_stats] == [s.item() for s in stats]

    @given(batch=batches, cut=st.integers(0, 5))
    def test_micro_batches_add_up(self, batch, cut):
        actions, rewards, mask = make_batch(*batch)
        loss, grads, stats = run(actions, rewards, mask)
        count = paddle.to_tensor(mask.sum())
        rows = [part for part in (slice(cut), slice(cut, None)) if len(mask[part])]
        parts = [run(ActionValues(*(x[s] for x in actions)), rewards[s], mask[s], count) for s in rows]
        assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-9, abs=1e-12)
        for name, grad in grads.items():
            np.testing.assert_allclose(np.concatenate([part[1][name] for part in parts]), grad, rtol=1e-9, atol=1e-12)
        added = [sum(s.item() for s in column) for column in zip(*(part[2] for part in parts), strict=True)]
        np.testing.assert_allclose(added, [s.item() for s in stats], rtol=1e-9, atol=1e-12)
