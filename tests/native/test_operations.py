"""The compiled operations against NumPy in float64, their gradients against central differences of the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.native import operations
from tests.native.compiler import needs_compiler

pytestmark = [needs_compiler, pytest.mark.skipif(paddle.get_device() != "cpu", reason="kernels of CPUs")]
seeds = st.integers(0, 2**31)
widths = st.sampled_from([1, 2, 7, 16, 31, 33, 70])  # around the lanes of a vector
small = st.integers(1, 4)
FORBIDDEN = float(np.finfo(np.float32).min)  # what PaddleNLP adds to the scores of masked positions


def rms_norm(x, weight, epsilon=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def rotated(x, cos, sin, positions):
    """x [B, L, heads, D] as complex numbers times exp(i angle)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[positions][:, :, None, :half]
    return np.concatenate([turned.real, turned.imag], -1)


def softmax(scores, mask, scale):
    shifted = scale * scores + mask
    e = np.exp(shifted - shifted.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def tables(count, size):
    """cos and sin, float32 [count, size], of positions 0..count-1."""
    angles = np.arange(count)[:, None] * 10000.0 ** (-np.arange(size // 2) * 2 / size)
    return tuple(np.concatenate([part, part], -1).astype(np.float32) for part in (np.cos(angles), np.sin(angles)))


def check(operation: Callable, reference: Callable, *inputs: np.ndarray) -> None:
    """Results, and gradients of a weighted sum of them, for float32 inputs of any shape."""
    random = np.random.default_rng(len(inputs))
    tensors = [paddle.to_tensor(value, stop_gradient=False) for value in inputs]
    exact = [value.astype(np.float64) for value in inputs]
    out = operation(*tensors)
    np.testing.assert_allclose(out.numpy(), reference(*exact), rtol=2e-5, atol=2e-6)
    weights = random.normal(size=out.shape).astype(np.float32)
    (out * paddle.to_tensor(weights)).sum().backward()
    for number, tensor in enumerate(tensors):
        direction = random.normal(size=exact[number].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [*exact]
            moved[number] = exact[number] + step * direction
            ends.append((reference(*moved) * weights).sum())
        slope = (tensor.grad.numpy().astype(np.float64) * direction).sum()
        size = np.abs(tensor.grad.numpy() * direction).sum()
        assert abs(slope - (ends[0] - ends[1]) / 2e-5) <= 1e-4 * size + 1e-6, number


def normal(seed, *shape, scale=1.0):
    return np.random.default_rng([seed, *shape]).normal(0, scale, shape).astype(np.float32)


@given(seeds, small, small, widths)
def test_rms_norm(seed, batch, length, width):
    x, weight = normal(seed, batch, length, width, scale=3), normal(seed, width)
    check(lambda x, weight: operations.rms_norm(x, weight, 1e-5), rms_norm, x, weight)


@given(seeds, small, widths)
def test_swiglu(seed, rows, width):
    check(operations.swiglu, swiglu, normal(seed, rows, width, scale=4), normal(seed + 1, rows, width))


def test_swiglu_of_extreme_gates():
    gate = paddle.to_tensor(np.asarray([-1e4, -100, -89, 0, 89, 1e4], np.float32), stop_gradient=False)
    up = paddle.ones_like(gate)
    out = operations.swiglu(gate, up)
    out.sum().backward()
    np.testing.assert_allclose(out.numpy(), [0, 0, 0, 0, 89, 1e4], atol=1e-30)
    np.testing.assert_allclose(gate.grad.numpy(), [0, 0, 0, 0.5, 1, 1], atol=1e-30)


@given(seeds, small, small, small, st.sampled_from([2, 6, 64]))
def test_rotate(seed, batch, length, heads, size):
    positions = np.random.default_rng(seed).integers(0, 9, [batch, length])
    cos, sin = tables(9, size)

    def rotate(x):
        return operations.rotate(x, *(paddle.to_tensor(value) for value in (cos, sin, positions)))

    check(rotate, lambda x: rotated(x, cos, sin, positions), normal(seed, batch, length, heads, size))


@given(seeds, small, small, small, widths)
def test_masked_softmax(seed, batch, heads, width, length):
    allowed = np.random.default_rng(seed).random([batch, 1, width, length]) < 0.6
    allowed[..., 0] = True
    mask, scale = np.where(allowed, 0, FORBIDDEN).astype(np.float32), 0.125

    def masked(scores):
        return operations.masked_softmax(scores, paddle.to_tensor(mask), scale)

    scores = normal(seed, batch, heads, width, length, scale=20)
    check(masked, lambda scores: softmax(scores, mask.astype(np.float64), scale), scores)
    weights = masked(paddle.to_tensor(scores)).numpy()
    assert (weights[~np.broadcast_to(allowed, weights.shape)] == 0).all()


def test_a_row_that_may_see_nothing_sees_everything_alike():
    """The first query of a row with padding on the left; nobody reads its result, but it must be a number."""
    mask = paddle.full([1, 1, 1, 5], FORBIDDEN)
    weights = operations.masked_softmax(paddle.to_tensor(normal(0, 1, 1, 1, 5)), mask, 1.0)
    np.testing.assert_allclose(weights.numpy(), 0.2, rtol=1e-6)


def test_one_row_of_positions_or_mask_serves_the_whole_batch():
    x, (cos, sin) = paddle.to_tensor(normal(0, 3, 4, 2, 6)), (paddle.to_tensor(table) for table in tables(9, 6))
    positions, mask = paddle.to_tensor([[3, 4, 5, 6]]), paddle.to_tensor(normal(1, 1, 1, 2, 6))
    for one, whole in (
        (operations.rotate(x, cos, sin, positions), operations.rotate(x, cos, sin, positions.tile([3, 1]))),
        (
            operations.masked_softmax(x, mask, 1.0),
            operations.masked_softmax(x, mask.tile([3, 1, 1, 1]), 1.0),
        ),
    ):
        np.testing.assert_array_equal(one.numpy(), whole.numpy())


def test_a_position_beyond_the_tables_is_refused():
    cos, sin = (paddle.to_tensor(table) for table in tables(4, 6))
    with pytest.raises(ValueError, match="rotary tables of 4 positions, but 3 to 4 are asked for"):
        operations.rotate(paddle.ones([1, 2, 1, 6]), cos, sin, paddle.to_tensor([[3, 4]]))


def test_hand_worked():
    x = paddle.to_tensor([[3.0, 4.0]])
    np.testing.assert_allclose(
        operations.rms_norm(x, paddle.to_tensor([1.0, 2.0]), 0.0).numpy(), [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6
    )
    quarter = [paddle.to_tensor([[value, value]]) for value in (0.0, 1.0)]  # cos, sin of 90 degrees
    turned = operations.rotate(x.reshape([1, 1, 1, 2]), *quarter, paddle.to_tensor([[0]]))
    np.testing.assert_allclose(turned.numpy().ravel(), [-4, 3])
    scores, mask = paddle.to_tensor([[[[0.0, 2 * np.log(3.0)]]]]), paddle.zeros([1, 1, 1, 2])
    weights = operations.masked_softmax(scores, mask, 0.5)
    np.testing.assert_allclose(weights.numpy().ravel(), [0.25, 0.75], rtol=1e-6)


def test_frozen_inputs_get_no_gradient():
    x, weight = paddle.to_tensor(normal(0, 2, 3), stop_gradient=False), paddle.to_tensor(normal(0, 3))
    operations.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None
    gate, up = paddle.to_tensor(normal(0, 2, 3)), paddle.to_tensor(normal(1, 2, 3), stop_gradient=False)
    operations.swiglu(gate, up).sum().backward()
    assert gate.grad is None and up.grad is not None
