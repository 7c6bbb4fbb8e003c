"""Log-probabilities, entropy and supervised loss from logits, against NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest

from alignment.ppo import losses


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (2, 4, 11)).astype(np.float32)


class TestLogProbs:
    def test_hand_worked(self):
        # logits ln 1, ln 3: probabilities 1/4, 3/4; at temperature 1/2 they are 1 and 9 of 10
        logits = paddle.to_tensor([[[0.0, math.log(3)]]])
        ids = paddle.to_tensor([[1]])
        assert losses.log_probs_from_logits(logits, ids).item() == pytest.approx(math.log(0.75), rel=1e-6)
        assert losses.log_probs_from_logits(logits, ids, 0.5).item() == pytest.approx(math.log(0.9), rel=1e-6)

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
    def test_equals_numpy(self, logits, temperature):
        ids = np.random.default_rng(1).integers(0, 11, (2, 4))
        got = losses.log_probs_from_logits(paddle.to_tensor(logits), paddle.to_tensor(ids), temperature)
        expected = np.take_along_axis(log_softmax(logits / temperature), ids[..., None], -1)[..., 0]
        assert got.shape == [2, 4]
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)

    def test_bfloat16_logits_are_summed_in_float32(self, logits):
        half = paddle.to_tensor(logits).astype("bfloat16")
        ids = paddle.zeros([2, 4], dtype="int64")
        got = losses.log_probs_from_logits(half, ids)
        assert got.dtype == paddle.float32
        expected = log_softmax(half.astype("float32").numpy())[..., 0]
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)

    def test_gradient_is_one_hot_minus_softmax(self, logits):
        x = paddle.to_tensor(logits)
        x.stop_gradient = False
        losses.log_probs_from_logits(x, paddle.full([2, 4], 3, dtype="int64"), 0.5).sum().backward()
        expected = (np.eye(11)[3] - np.exp(log_softmax(logits / 0.5))) / 0.5
        np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-5)


class TestEntropy:
    def test_of_equal_and_of_impossible_choices(self):
        # 4 equal choices: ln 4; two of them impossible: ln 2; one certain: 0
        low = -math.inf
        entropy = losses.entropy_from_logits(paddle.to_tensor([[[0, 0, 0, 0], [0, 0, low, low], [0, low, low, low]]]))
        np.testing.assert_allclose(entropy.numpy(), [[math.log(4), math.log(2), 0]], atol=1e-6)

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_value_and_gradient_equal_numpy(self, logits, temperature):
        x = paddle.to_tensor(logits)
        x.stop_gradient = False
        entropy = losses.entropy_from_logits(x, temperature)
        entropy.sum().backward()
        log_p = log_softmax(logits / temperature)
        expected = -(np.exp(log_p) * log_p).sum(-1)
        np.testing.assert_allclose(entropy.numpy(), expected, atol=1e-5)
        gradient = -np.exp(log_p) * (log_p + expected[..., None]) / temperature
        np.testing.assert_allclose(x.grad.numpy(), gradient, atol=1e-5)

    def test_of_a_real_vocabulary(self):
        x = np.random.default_rng(2).normal(0, 3, (1, 2, 49152)).astype(np.float32)
        log_p = log_softmax(x)
        entropy = losses.entropy_from_logits(paddle.to_tensor(x)).numpy()
        np.testing.assert_allclose(entropy, -(np.exp(log_p) * log_p).sum(-1), rtol=2e-4)
