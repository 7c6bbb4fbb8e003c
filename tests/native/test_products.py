"""Products and activations of the C++ kernels for sizes that fill no vector, and for every gate."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from alignment.ppo.rollout.decoder import Decoder, DecoderLayer
from alignment.ppo.rollout.native.kernels import NativeKernels
from tests.native.compiler import needs_compiler

pytestmark = needs_compiler


def make_decoder(hidden: int, inner: int, columns: int, transposed: bool, seed: int = 0) -> Decoder:
    """One layer of random weights; heads of two numbers."""
    random = np.random.default_rng(seed)

    def weight(*shape: int) -> paddle.Tensor:
        return paddle.to_tensor(random.normal(0, 1, shape).astype(np.float32))

    heads = hidden // 2
    layer = DecoderLayer(
        attention_norm=weight(hidden), qkv=[weight(hidden, hidden), weight(hidden, 2), weight(hidden, 2)], qkv_bias=[],
        output=weight(hidden, hidden), mlp_norm=weight(hidden), gate_up=[weight(hidden, inner), weight(hidden, inner)],
        down=weight(inner, hidden),
    )  # fmt: skip
    head = weight(columns, hidden) if transposed else weight(hidden, columns)
    return Decoder(
        layers=[layer], embed=None, norm=weight(hidden), head=head, head_is_transposed=transposed, hidden=hidden,
        heads=heads, groups=1, size=2, inner=inner, columns=columns, epsilon=1e-6, dtype="float32",
        rotary=lambda length: (np.ones([length, 2], np.float32), np.zeros([length, 2], np.float32)),
    )  # fmt: skip


def normalized(x: np.ndarray, weight: paddle.Tensor) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight.numpy().astype(np.float64)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 50])
@pytest.mark.parametrize(("hidden", "inner", "columns"), [(2, 1, 1), (6, 15, 33), (34, 17, 31), (64, 48, 100)])
@pytest.mark.parametrize("transposed", [False, True])
def test_feed_forward_layer_and_head_are_those_of_numpy(rows, hidden, inner, columns, transposed):
    decoder = make_decoder(hidden, inner, columns, transposed)
    kernels = NativeKernels(decoder, rows, 8, 8, None)
    x = np.random.default_rng(1).normal(0, 1, [rows, hidden]).astype(np.float32)
    layer, wide = decoder.layers[0], x.astype(np.float64)
    gate, up = (normalized(wide, layer.mlp_norm) @ part.numpy().astype(np.float64) for part in layer.gate_up)
    expected = wide + silu(gate) * up @ layer.down.numpy().astype(np.float64)
    np.testing.assert_allclose(kernels.mlp(0, x.copy()), expected, rtol=2e-5, atol=2e-4)
    head = decoder.head.numpy().astype(np.float64)
    expected = normalized(wide, decoder.norm) @ (head.T if transposed else head)
    np.testing.assert_allclose(kernels.logits(x), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("gate", [-300.0, -120.0, -89.5, -88.0, -20.0, -1.0, 0.0, 1e-3, 5.0, 88.5, 300.0])
def test_every_gate(gate):
    """The normalised row is (gate, 1): the layer adds silu(gate) * 1 to the first number."""
    decoder = make_decoder(2, 1, 1, False)
    layer = decoder.layers[0]
    layer.mlp_norm.set_value(np.array([gate, 1], np.float32))
    layer.gate_up[0].set_value(np.array([[1], [0]], np.float32))
    layer.gate_up[1].set_value(np.array([[0], [1]], np.float32))
    layer.down.set_value(np.array([[1, 0]], np.float32))
    added = NativeKernels(decoder, 1, 8, 8, None).mlp(0, np.ones([1, 2], np.float32))[0, 0] - 1
    np.testing.assert_allclose(added, silu(np.float64(gate)), rtol=1e-5, atol=1e-6)
