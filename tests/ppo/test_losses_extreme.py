"""Policy losses far out, in float32: huge advantages and ratios give no NaN. And gradients down to the logits."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.ppo import losses

CEILING = losses.LARGEST_EXPONENT
anything = st.lists(
    st.one_of(st.floats(-200, 200), st.floats(width=32, allow_nan=False), st.sampled_from([math.inf, -math.inf])),
    min_size=1,
    max_size=6,
)
log_probabilities = st.floats(-80, 0)


def row(values, trained: bool = False) -> paddle.Tensor:
    tensor = paddle.to_tensor(np.asarray([values], np.float32))
    tensor.stop_gradient = not trained
    return tensor


def all_valid(n: int) -> paddle.Tensor:
    return paddle.ones([1, n], dtype="bool")


class TestAwr:
    @given(anything, st.sampled_from([0.01, 0.1, 1.0, 10.0]), st.sampled_from([None, 0.5, 20.0, 1e30]))
    def test_whatever_the_advantages_all_is_finite_and_cuts_are_counted(self, advantages, beta, weight_clip):
        n = len(advantages)
        new = row([-2.0] * n, trained=True)
        loss, stats = losses.awr_loss(new, new.detach(), row(advantages), all_valid(n), beta, weight_clip)
        loss.backward()
        exponent = row(advantages).numpy()[0] / np.float32(beta)
        ceiling = CEILING if weight_clip is None else min(math.log(weight_clip), CEILING)
        weight = np.exp(np.minimum(exponent.astype(np.float64), ceiling))
        assert math.isfinite(loss.item()) and all(math.isfinite(x.item()) for x in stats)
        np.testing.assert_allclose(new.grad.numpy()[0], -weight / n, rtol=1e-4, atol=1e-30)
        assert stats.clipped.item() == (exponent > np.float32(ceiling)).sum()
        assert stats.weight.item() == pytest.approx(weight.sum(), rel=1e-4)
        assert stats.weight_sq.item() == pytest.approx((weight**2).sum(), rel=1e-4)

    def test_a_single_huge_weight_shows_in_the_effective_tokens(self):
        _, stats = losses.awr_loss(row([-1.0] * 4), row([-1.0] * 4), row([30.0, 0.0, 0.0, 0.0]), all_valid(4))
        assert stats.weight.item() ** 2 / stats.weight_sq.item() == pytest.approx(1.0, abs=1e-9)

    def test_an_advantage_that_is_no_number_is_not_hidden(self):
        loss, _ = losses.awr_loss(row([-1.0]), row([-1.0]), row([math.nan]), all_valid(1))
        assert math.isnan(loss.item())


class TestApa:
    @given(st.lists(st.tuples(log_probabilities, st.floats(-1e17, 1e17)), min_size=1, max_size=6))
    def test_loss_and_gradient_are_finite_to_the_root_of_float32(self, tokens):
        n, (log_probs, advantages) = len(tokens), zip(*tokens, strict=True)
        new = row(log_probs, trained=True)
        loss, stats = losses.apa_loss(new, new.detach(), row([-1.0] * n), row(advantages), all_valid(n), 0.1)
        loss.backward()
        residual = row(log_probs).numpy()[0] + 1.0 - row(advantages).numpy()[0].astype(np.float64) / 0.1
        np.testing.assert_allclose(loss.item(), (residual**2).mean(), rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(new.grad.numpy()[0], 2 * residual / n, rtol=1e-4, atol=1e-4)
        assert all(math.isfinite(x.item()) for x in stats)

    def test_beyond_that_the_loss_is_infinite_and_the_gradient_still_right(self):
        new = row([-1.0, -2.0], trained=True)
        loss, _ = losses.apa_loss(new, new.detach(), row([-1.0, -2.0]), row([1e30, 0.0]), all_valid(2), 0.1)
        loss.backward()
        assert loss.item() == math.inf
        np.testing.assert_allclose(new.grad.numpy(), [[-1e31, 0.0]], rtol=1e-5)


class TestPpo:
    @given(
        st.lists(
            st.tuples(log_probabilities, log_probabilities, st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=6
        )
    )
    def test_ratios_from_nothing_to_e_80(self, tokens):
        n, (log_probs, old, advantages) = len(tokens), zip(*tokens, strict=True)
        new = row(log_probs, trained=True)
        loss, stats = losses.ppo_loss(new, row(old), row(advantages), all_valid(n), 0.2)
        loss.backward()
        a = row(advantages).numpy()[0].astype(np.float64)
        ratio = np.exp((row(log_probs) - row(old)).numpy()[0].astype(np.float64))
        outside = ((a > 0) & (ratio > 1.2 + 1e-6)) | ((a < 0) & (ratio < 0.8 - 1e-6))
        expected = np.maximum(-a * ratio, -a * ratio.clip(0.8, 1.2))
        np.testing.assert_allclose(loss.item(), expected.mean(), rtol=1e-4, atol=1e-6 * np.abs(expected).max() + 1e-35)
        assert (new.grad.numpy()[0][outside] == 0).all() and np.isfinite(new.grad.numpy()).all()
        assert stats.clipped.item() >= outside.sum() and all(math.isfinite(x.item()) for x in stats)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("objective", ["ppo", "apa", "awr"])
def test_gradient_with_respect_to_logits_by_finite_differences(objective, temperature):
    random = np.random.default_rng(4)
    start, ids = random.normal(0, 1, (2, 3, 5)), paddle.to_tensor(random.integers(0, 5, (2, 3)))
    old, anchor, advantages = (paddle.to_tensor(random.normal(m, 0.5, (2, 3))) for m in (-1.6, -1.6, 0.0))
    mask = paddle.to_tensor([[True, True, True], [True, False, False]])

    def loss_at(values: np.ndarray) -> tuple[paddle.Tensor, paddle.Tensor]:
        logits = paddle.to_tensor(values)
        logits.stop_gradient = False
        new = losses.log_probs_from_logits(logits, ids, temperature)
        if objective == "apa":
            return losses.apa_loss(new, old, anchor, advantages, mask, 0.5)[0], logits
        if objective == "awr":
            return losses.awr_loss(new, old, advantages, mask, 0.5, 3.0)[0], logits
        return losses.ppo_loss(new, old, advantages, mask, 0.2)[0], logits

    loss, logits = loss_at(start)
    loss.backward()
    numeric, step = np.zeros_like(start), 1e-6
    for at in np.ndindex(*start.shape):
        moved = [start.copy(), start.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        numeric[at] = (loss_at(moved[0])[0].item() - loss_at(moved[1])[0].item()) / (2 * step)
    np.testing.assert_allclose(logits.grad.numpy(), numeric, atol=1e-8)
    assert np.abs(numeric).max() > 1e-2 and (numeric[1, 1:] == 0).all()
