"""PPO, APA, AWR and value losses: hand-worked numbers, loops in NumPy as an independent reference, and properties."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.ppo import losses

quick = settings(max_examples=25, deadline=None, derandomize=True)
batches = st.tuples(st.integers(0, 2**31), st.lists(st.integers(0, 6), min_size=1, max_size=5))

# name -> (loss of the trained tensor and three others, one term in plain Python). Fields x, a, b, c in this order.
LOSSES = {
    "ppo": (
        lambda x, old, _, adv, mask, n=None: losses.ppo_loss(x, old, adv, mask, 0.2, n),
        lambda x, old, _, adv: max(-adv * math.exp(x - old), -adv * min(max(math.exp(x - old), 0.8), 1.2)),
    ),
    "apa": (
        lambda x, old, anchor, adv, mask, n=None: losses.apa_loss(x, old, anchor, adv, mask, 0.5, n),
        lambda x, old, anchor, adv: (x - anchor - adv / 0.5) ** 2,
    ),
    "awr": (
        lambda x, old, _, adv, mask, n=None: losses.awr_loss(x, old, adv, mask, 0.5, 3.0, n),
        lambda x, old, _, adv: -min(math.exp(adv / 0.5), 3.0) * x,
    ),
    "value": (
        lambda x, old, ret, _, mask, n=None: losses.value_loss(x, old, ret, mask, 0.3, n),
        lambda x, old, ret, _: 0.5 * max((x - ret) ** 2, (min(max(x, old - 0.3), old + 0.3) - ret) ** 2),
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def make_batch(seed: int, lengths: list[int], width: int = 6) -> tuple[list[np.ndarray], np.ndarray]:
    """Three float64 [B, T] tensors near each other, advantages, and the mask of answers of the given lengths."""
    rng = np.random.default_rng(seed)
    x = rng.normal(-1.0, 0.5, (len(lengths), width))
    near = [x + rng.normal(0, 0.4, x.shape) for _ in range(2)]
    return [x, *near, rng.normal(0, 1, x.shape)], np.arange(width) < np.array(lengths)[:, None]


def tensors(arrays, mask, dtype: str = "float64"):
    return [paddle.to_tensor(a, dtype=dtype) for a in arrays], paddle.to_tensor(mask)


def run(name, arrays, mask, denominator=None, dtype: str = "float64"):
    """Loss, gradient with respect to the trained tensor, stats."""
    fields, mask = tensors(arrays, mask, dtype)
    fields[0].stop_gradient = False
    loss, stats = LOSSES[name][0](*fields, mask, denominator)
    loss.backward()
    return loss.item(), fields[0].grad.numpy(), stats


def row(*values: float) -> paddle.Tensor:
    return paddle.to_tensor([values], dtype="float64")


def all_valid(n: int) -> paddle.Tensor:
    return paddle.ones([1, n], dtype="bool")


class TestHandWorked:
    def test_ppo(self):
        # ratios 1.5, 0.5, 1.5, 0.5 with clip 0.2 and advantages 1, 1, -1, -1:
        #   max(-1.5, -1.2) = -1.2 (clipped), max(-0.5, -0.8) = -0.5, max(1.5, 1.2) = 1.5, max(.5, .8) = .8 (clipped)
        # sum 0.6, mean 0.15. Gradient of a term: 0 if clipped, else -A ratio, over 4: 0, -0.125, 0.375, 0.
        log_probs = row(*np.log([1.5, 0.5, 1.5, 0.5]))
        log_probs.stop_gradient = False
        loss, stats = losses.ppo_loss(log_probs, row(0, 0, 0, 0), row(1, 1, -1, -1), all_valid(4), 0.2)
        loss.backward()
        assert loss.item() == pytest.approx(0.15)
        np.testing.assert_allclose(log_probs.grad.numpy(), [[0, -0.125, 0.375, 0]], atol=1e-12)
        assert stats.tokens.item() == 4 and stats.clipped.item() == 2
        assert stats.ratio.item() == pytest.approx(4.0)  # 1.5 + 0.5 + 1.5 + 0.5
        assert stats.ratio_sq.item() == pytest.approx(5.0)  # 2.25 + 0.25 + 2.25 + 0.25
        # 0.5 (ln 1.5)^2 = 0.0822010 and 0.5 (ln 0.5)^2 = 0.2402265, each twice
        assert stats.approxkl.item() == pytest.approx(0.644855, abs=1e-6)

    def test_ppo_has_no_dual_clip(self):
        # A = -1, ratio 5: verl's default dual clip would say 3.
        loss, _ = losses.ppo_loss(row(math.log(5)), row(0), row(-1), all_valid(1))
        assert loss.item() == pytest.approx(5.0)

    def test_ppo_at_ratio_one_is_the_policy_gradient(self):
        log_probs = row(-1.0, -2.0)
        log_probs.stop_gradient = False
        loss, stats = losses.ppo_loss(log_probs, log_probs.detach(), row(3.0, -1.0), all_valid(2))
        loss.backward()
        assert loss.item() == pytest.approx(-1.0)  # -(3 - 1) / 2
        np.testing.assert_allclose(log_probs.grad.numpy(), [[-1.5, 0.5]])  # -A / 2, also where both branches tie
        assert stats.approxkl.item() == 0 and stats.clipped.item() == 0 and stats.ratio.item() == 2

    def test_apa(self):
        # lambda 0.1, A 0.05: target = anchor + 0.5. Residuals -1 - (-1.2 + 0.5) = -0.3 and -2 - (-2 - 1) = 1
        # with A = -0.1. Loss (0.09 + 1) / 2 = 0.545; gradient 2 residual / 2 = -0.3, 1.
        log_probs = row(-1.0, -2.0)
        log_probs.stop_gradient = False
        loss, stats = losses.apa_loss(log_probs, row(-1.0, -2.5), row(-1.2, -2.0), row(0.05, -0.1), all_valid(2), 0.1)
        loss.backward()
        assert loss.item() == pytest.approx(0.545)
        np.testing.assert_allclose(log_probs.grad.numpy(), [[-0.3, 1.0]])
        # the stats are against the policy that sampled, not the anchor: log ratios 0 and 0.5
        assert stats.approxkl.item() == pytest.approx(0.125)
        assert stats.ratio.item() == pytest.approx(1 + math.exp(0.5))

    def test_awr(self):
        # beta 2, A = 2 ln 3 and 2 ln 0.5: weights 3 and 0.5; clip at 2 makes the first one 2.
        advantages = row(2 * math.log(3), 2 * math.log(0.5))
        log_probs = row(-1.0, -2.0)
        loss, stats = losses.awr_loss(log_probs, log_probs, advantages, all_valid(2), 2.0)
        assert loss.item() == pytest.approx(2.0)  # (3 + 1) / 2
        assert (stats.weight.item(), stats.weight_sq.item()) == pytest.approx((3.5, 9.25))
        assert stats.clipped.item() == 0
        loss, stats = losses.awr_loss(log_probs, log_probs, advantages, all_valid(2), 2.0, weight_clip=2.0)
        assert loss.item() == pytest.approx(1.5)  # (2 + 1) / 2
        assert stats.clipped.item() == 1

    def test_value(self):
        # V 1, 2; old 0, 2; R 2, 0; clip 0.5. First: near = 0.5, max(1, 2.25) = 2.25 (clipped, so no gradient);
        # second: near = 2, max(4, 4) = 4. Loss 0.5 * 6.25 / 2 = 1.5625; gradient 0 and (2 - 0) / 2 = 1.
        values = row(1.0, 2.0)
        values.stop_gradient = False
        loss, stats = losses.value_loss(values, row(0.0, 2.0), row(2.0, 0.0), all_valid(2), 0.5)
        loss.backward()
        assert loss.item() == pytest.approx(1.5625)
        np.testing.assert_allclose(values.grad.numpy(), [[0.0, 1.0]])
        assert (stats.tokens.item(), stats.clipped.item()) == (2, 1)


class TestAwrOverflow:
    def test_stays_finite_and_is_counted(self):
        # exp(1000 / 0.1) overflows any float; the paper's code returns inf, then NaN.
        log_probs = paddle.to_tensor([[-2.0, -1.0, 0.0]])
        log_probs.stop_gradient = False
        advantages = paddle.to_tensor([[1000.0, 0.0, math.inf]])
        loss, stats = losses.awr_loss(log_probs, log_probs.detach(), advantages, all_valid(3), awr_beta=0.1)
        loss.backward()
        assert math.isfinite(loss.item()) and np.isfinite(log_probs.grad.numpy()).all()
        assert stats.clipped.item() == 2 and math.isfinite(stats.weight_sq.item())

    def test_very_bad_actions_weigh_nothing(self):
        loss, stats = losses.awr_loss(row(-2.0), row(-2.0), row(-1e6), all_valid(1))
        assert loss.item() == 0 and stats.weight.item() == 0 and stats.clipped.item() == 0

    def test_no_gradient_through_the_advantage(self):
        advantages = row(1.0)
        advantages.stop_gradient = False
        loss, _ = losses.awr_loss(row(-2.0), row(-2.0), advantages, all_valid(1))
        assert loss.stop_gradient


@every_loss
class TestEveryLoss:
    @quick
    @given(batch=batches)
    def test_equals_the_loop(self, name, batch):
        arrays, mask = make_batch(*batch)
        terms = [LOSSES[name][1](*(a[i, t] for a in arrays)) for i, t in zip(*np.nonzero(mask), strict=True)]
        assert run(name, arrays, mask)[0] == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-9, abs=1e-12)

    @quick
    @given(batch=batches, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -100.0]))
    def test_padding_never_counts(self, name, batch, garbage):
        arrays, mask = make_batch(*batch)
        loss, grad, stats = run(name, arrays, mask)
        spoilt, spoilt_grad, spoilt_stats = run(name, [np.where(mask, a, garbage) for a in arrays], mask)
        assert spoilt == loss
        np.testing.assert_array_equal(spoilt_grad, grad)
        assert (grad[~mask] == 0).all()
        assert [s.item() for s in spoilt_stats] == [s.item() for s in stats]

    @quick
    @given(batch=batches, cut=st.integers(0, 5))
    def test_micro_batches_add_up(self, name, batch, cut):
        arrays, mask = make_batch(*batch)
        loss, grad, stats = run(name, arrays, mask)
        count = paddle.to_tensor(mask.sum())
        parts = [run(name, [a[s] for a in arrays], mask[s], count) for s in (slice(cut), slice(cut, None))]
        assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), grad, rtol=1e-9, atol=1e-12)
        added = type(parts[0][2])(*map(sum, zip(*(part[2] for part in parts), strict=True)))
        assert type(added) is type(stats)
        np.testing.assert_allclose([s.item() for s in added], [s.item() for s in stats], rtol=1e-9, atol=1e-12)

    @quick
    @given(batch=batches, order=st.randoms(use_true_random=False))
    def test_order_of_rows_does_not_matter(self, name, batch, order):
        arrays, mask = make_batch(*batch)
        rows = list(range(len(mask)))
        order.shuffle(rows)
        loss, grad, _ = run(name, arrays, mask)
        moved, moved_grad, _ = run(name, [a[rows] for a in arrays], mask[rows])
        assert moved == pytest.approx(loss, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(moved_grad, grad[rows], rtol=1e-9, atol=1e-12)

    def test_gradient_by_finite_differences(self, name):
        arrays, mask = make_batch(11, [6, 3, 1, 5])
        _, grad, _ = run(name, arrays, mask)
        step, numeric = 1e-6, np.zeros_like(grad)
        for i, t in np.ndindex(grad.shape):
            ends = []
            for sign in (1, -1):
                moved = arrays[0].copy()
                moved[i, t] += sign * step
                ends.append(run(name, [moved, *arrays[1:]], mask)[0])
            numeric[i, t] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(grad, numeric, atol=1e-8)
        assert np.abs(grad).max() > 1e-2

    def test_empty_mask_gives_zero_loss_and_gradient(self, name):
        arrays, mask = make_batch(3, [0, 0])
        for denominator in (None, 0, 0.0, paddle.zeros([], dtype="int64"), 7):
            loss, grad, stats = run(name, arrays, mask, denominator)
            assert loss == 0 and (grad == 0).all() and all(s.item() == 0 for s in stats)

    def test_mean_of_means_is_not_what_is_computed(self, name):
        # a negative control: 1 token in one micro-batch, 6 in the other
        arrays, mask = make_batch(5, [1, 6])
        parts = [run(name, [a[i : i + 1] for a in arrays], mask[i : i + 1])[0] for i in range(2)]
        assert run(name, arrays, mask)[0] != pytest.approx(np.mean(parts), rel=1e-3)

    def test_float32_stays_float32(self, name):
        arrays, mask = make_batch(5, [1, 6])
        fields, mask_tensor = tensors(arrays, mask, "float32")
        loss, stats = LOSSES[name][0](*fields, mask_tensor)
        assert loss.dtype == paddle.float32 and loss.shape == []
        assert all(s.dtype == paddle.float64 and s.stop_gradient for s in stats)
        assert loss.item() == pytest.approx(run(name, arrays, mask)[0], rel=1e-5)
