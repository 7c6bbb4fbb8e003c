"""Differentiable operations between a decoder's matrix products, on the compiled kernels; float32 on a CPU.

Paddle 3.3.1 computes most of these with one thread and one pass over memory for each operator.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import paddle
from paddle.autograd import PyLayer

from alignment.native.build import load_library
from alignment.runtime.bootstrap import compute_threads

_KINDS = {"p": c_void_p, "n": c_int64, "f": c_float}
_ARGUMENTS = {  # pointers, sizes and floats in elementwise.h's order; the number of threads comes last
    "rms_norm": "pnnpfpp",
    "rms_norm_grad": "pnnppppp",
    "swiglu": "ppnp",
    "swiglu_grad": "pppnpp",
    "rotate": "pnnnpppfp",
    "masked_softmax": "ppnnnnfp",
    "masked_softmax_grad": "ppnnfp",
}


def rms_norm(x: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """x [..., H] over the root of its mean square, times weight [H] (arXiv:1910.07467)."""
    return _RMSNorm.apply(x, weight, epsilon)


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """gate * sigmoid(gate) * up, all of one shape (arXiv:2002.05202)."""
    return _SwiGLU.apply(gate, up)


def rotate(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, positions: paddle.Tensor) -> paddle.Tensor:
    """Rotary embedding (arXiv:2104.09864) of x [B, L, heads, D].

    Args: cos, sin: P times D numbers, whose halves are alike; positions: int64 [B, L] or [1, L], below P.
    Raises: ValueError for a position without a row in the tables, which the kernel would read beyond their end.
    """
    positions = _spread(positions, x.shape[:2]).astype("int64")
    first, last, count = int(positions.min()), int(positions.max()), cos.size // x.shape[-1]
    if not 0 <= first <= last < count:
        raise ValueError(f"rotary tables of {count} positions, but {first} to {last} are asked for")
    return _Rotate.apply(x, cos, sin, positions)


def masked_softmax(scores: paddle.Tensor, mask: paddle.Tensor, scale: float) -> paddle.Tensor:
    """softmax(scale * scores + mask) over the last axis; scores [B, heads, Q, L], mask [B or 1, 1, Q, L], no gradient.

    No row of the mask may be -inf throughout.
    """
    batch, _, width, length = scores.shape
    return _MaskedSoftmax.apply(scores, _spread(mask, [batch, 1, width, length]), scale)


class _RMSNorm(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        rows, width = _rows(x), x.shape[-1]
        out, scales = paddle.empty_like(x), paddle.empty([rows])
        _call("rms_norm", x, rows, width, weight, epsilon, out, scales)
        ctx.trained = _trained(x, weight)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensor()
        x_grad, weight_grad = paddle.empty_like(x), paddle.empty_like(weight)
        _call("rms_norm_grad", x, _rows(x), x.shape[-1], weight, scales, out_grad, x_grad, weight_grad)
        return _wanted(ctx, x_grad, weight_grad)


class _SwiGLU(PyLayer):
    @staticmethod
    def forward(ctx: Any, gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
        out = paddle.empty_like(gate)
        _call("swiglu", gate, up, gate.size, out)
        ctx.trained = _trained(gate, up)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        gate, up = ctx.saved_tensor()
        gate_grad, up_grad = paddle.empty_like(gate), paddle.empty_like(up)
        _call("swiglu_grad", gate, up, out_grad, gate.size, gate_grad, up_grad)
        return _wanted(ctx, gate_grad, up_grad)


class _Rotate(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, *tables: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(*tables)
        return _turn(x, *tables, direction=1.0)

    @staticmethod
    def backward(ctx: Any, out_grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        return _turn(out_grad, *ctx.saved_tensor(), direction=-1.0), None, None, None


class _MaskedSoftmax(PyLayer):
    @staticmethod
    def forward(ctx: Any, scores: paddle.Tensor, mask: paddle.Tensor, scale: float) -> paddle.Tensor:
        weights = paddle.empty_like(scores)
        _call("masked_softmax", scores, mask, *scores.shape, scale, weights)
        ctx.scale = scale
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, weights_grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        (weights,) = ctx.saved_tensor()
        scores_grad = paddle.empty_like(weights)
        _call("masked_softmax_grad", weights, weights_grad, _rows(weights), weights.shape[-1], ctx.scale, scores_grad)
        return scores_grad, None


def _turn(
    x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, positions: paddle.Tensor, direction: float
) -> paddle.Tensor:
    out, (heads, size) = paddle.empty_like(x), x.shape[-2:]
    _call("rotate", x, positions.size, heads, size, positions, cos, sin, direction, out)
    return out


def _spread(x: paddle.Tensor, shape: list[int]) -> paddle.Tensor:
    """``x`` with every row of ``shape`` there: kernels do not broadcast."""
    return x if x.shape == shape else x.expand(shape)


def _rows(x: paddle.Tensor) -> int:
    return x.size // x.shape[-1]


def _trained(*inputs: paddle.Tensor) -> list[bool]:
    """Which inputs have a gradient; asked in the forward pass, for saved tensors do not tell under recomputation."""
    return [not value.stop_gradient for value in inputs]


def _wanted(ctx: Any, *gradients: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
    """Each input's gradient, None where the input has none, as Paddle demands."""
    return tuple(gradient if trained else None for gradient, trained in zip(gradients, ctx.trained, strict=True))


def _call(name: str, *arguments: paddle.Tensor | float) -> None:
    """A kernel, given tensors by their addresses."""
    whole = [value.contiguous() if isinstance(value, paddle.Tensor) else value for value in arguments]
    values = [value.data_ptr() if isinstance(value, paddle.Tensor) else value for value in whole]
    _function(name)(*values, compute_threads())


@cache
def _function(name: str) -> Any:
    function = getattr(load_library(), name)
    function.argtypes = [*(_KINDS[kind] for kind in _ARGUMENTS[name]), c_int]
    function.restype = None
    return function
