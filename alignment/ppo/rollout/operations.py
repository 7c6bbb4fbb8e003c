"""The operations that a layer is made of: plain Paddle, or Paddle's fused GPU kernels where they prove equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import paddle
import paddle.nn.functional as F
from paddle.incubate.nn import functional as fused

Tensor = paddle.Tensor
_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}  # of a fused kernel, against numbers of size 1


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, computed in float32 (arXiv:1910.07467)."""
    wide = x.astype("float32")
    scale = paddle.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202)."""
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [rows, heads, size]; cos, sin: float32 [rows, 1, size] (arXiv:2104.09864)."""
    wide = x.astype("float32")
    first, second = paddle.split(wide, 2, axis=-1)
    return (wide * cos + paddle.concat([-second, first], axis=-1) * sin).astype(x.dtype)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention in which several query heads share a key head.

    Args: query [n, Q, groups, heads / groups, size]; keys, values [n, L, groups, size]; mask bool [n, Q, L], True
        where a query may look. Returns [n, Q, groups, heads / groups, size].
    """
    count, width, groups, shared, size = query.shape
    length = keys.shape[1]
    rows = (query * size**-0.5).transpose([0, 2, 3, 1, 4]).reshape([count, groups, shared * width, size])
    keys, values = (x.transpose([0, 2, 1, 3]) for x in (keys, values))
    scores = paddle.matmul(rows, keys, transpose_y=True).astype("float32")
    scores = scores.reshape([count, groups, shared, width, length])
    scores = paddle.where(mask.unsqueeze([1, 2]), scores, paddle.full([1], -1e30))
    weights = F.softmax(scores, axis=-1).astype(values.dtype).reshape([count, groups, shared * width, length])
    mixed = paddle.matmul(weights, values).reshape([count, groups, shared, width, size])
    return mixed.transpose([0, 3, 1, 2, 4])


@dataclass(frozen=True)
class Operations:
    """What PaddleKernels compute with."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = attend


def _fused_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return fused.fused_rms_norm(x, weight, None, epsilon, begin_norm_axis=x.ndim - 1)[0]


def _fused_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tables = (part.transpose([1, 0, 2]).unsqueeze(2).astype(x.dtype) for part in (sin, cos))  # [1, rows, 1, size]
    options = dict(zip(("sin", "cos"), tables, strict=True))
    return fused.fused_rotary_position_embedding(x.unsqueeze(0), use_neox_rotary_style=False, **options)[0].squeeze(0)


def _flash_attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    count, width, groups, shared, size = query.shape
    keys, values = (x.repeat_interleave(shared, axis=2) for x in (keys, values))
    added = paddle.where(mask.unsqueeze(1), paddle.zeros([1]), paddle.full([1], -1e30)).astype(query.dtype)
    flat = query.reshape([count, width, groups * shared, size])
    return F.scaled_dot_product_attention(flat, keys, values, attn_mask=added).reshape(query.shape)


FUSED = {
    "rms_norm": ("fused_rms_norm", _fused_rms_norm),
    "swiglu": ("swiglu", lambda gate, up: F.swiglu(gate, up)),
    "rotate": ("fused_rotary_position_embedding", _fused_rotate),
    "attend": ("scaled_dot_product_attention", _flash_attend),
}


def find_operations(dtype: str) -> tuple[Operations, list[str], list[str]]:
    """The fused kernels of the installed Paddle that give on this device what the plain operations give.

    Returns: operations; names of the kernels in use; "name (reason)" of those that are not.
    """
    operations, used, missing = Operations(), [], []
    examples = _examples(dtype)
    for name, (kernel, function) in FUSED.items():
        try:
            expected = getattr(operations, name)(*examples[name]).astype("float32")
            difference = float((function(*examples[name]).astype("float32") - expected).abs().max())
            if not difference <= _TOLERANCE[dtype]:
                raise ValueError(f"differs by {difference:.2g}")
        except Exception as error:  # a kernel that is not built in raises whatever it likes
            missing.append(f"{kernel} ({str(error).strip().splitlines()[0][:80] if str(error) else 'not built in'})")
            continue
        operations = replace(operations, **{name: function})
        used.append(kernel)
    return operations, used, missing


def _examples(dtype: str) -> dict[str, tuple]:
    """Arguments of every operation, of the sizes that models have; the process's random state is left alone."""

    def numbers(*shape: int) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        return paddle.sin(paddle.arange(count, dtype="float32") * 0.7).reshape(list(shape)).astype(dtype)

    angles = paddle.arange(5, dtype="float32").reshape([5, 1, 1]) * paddle.linspace(0.1, 1, 32).tile([2])
    mask = paddle.arange(7) <= paddle.to_tensor([[4], [5], [6]])
    return {
        "rms_norm": (numbers(5, 256), numbers(256), 1e-5),
        "swiglu": (numbers(5, 256), numbers(5, 256) * 0.5),
        "rotate": (numbers(5, 6, 64), angles.cos(), angles.sin()),
        "attend": (numbers(2, 3, 2, 3, 64), numbers(2, 7, 2, 64), numbers(2, 7, 2, 64), mask.tile([2, 1, 1])),
    }
