"""The operations that a layer is made of: plain Paddle, or Paddle's fused GPU kernels where they prove equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.incubate.nn import functional as fused
from paddle.nn.functional.flash_attention import flash_attn_unpadded

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


class Texts:
    """Texts of which a pass computes ``count`` consecutive tokens each, the last ones of what is in the cache.

    rows: int64 [n * count], in the pass. places: int64 [n, longest], in the cache, padded. mask: bool [n, count,
    longest], True where a token may look. flat: int64 [all tokens], places without padding. starts: int32 [n + 1]
    each, where texts begin in the rows and in ``flat``.
    """

    def __init__(
        self, starts: np.ndarray, count: int, positions: np.ndarray, slots: np.ndarray, tables: np.ndarray
    ) -> None:
        self.count = int(count)
        rows = np.asarray(starts, np.int64)[:, None] + np.arange(self.count)
        self.rows = paddle.to_tensor(rows.flatten())
        if not rows.size:
            return
        lengths = positions[rows[:, -1]] + 1
        self.longest = int(lengths.max())
        places = tables[slots[rows[:, 0]], : self.longest].astype(np.int64)
        is_text = np.arange(self.longest) < lengths[:, None]
        # Padding repeats the first place: another may never have been written, and 0 times NaN is NaN.
        self.places = paddle.to_tensor(np.where(is_text, places, places[:, :1]))
        self.mask = paddle.to_tensor(np.arange(self.longest) <= positions[rows][:, :, None])
        self.flat = paddle.to_tensor(places[is_text])
        ends = (np.arange(len(rows)) + 1) * self.count, lengths.cumsum()
        self.starts = tuple(paddle.to_tensor(np.concatenate([[0], end]), dtype="int32") for end in ends)


def attend(query: Tensor, keys: Tensor, values: Tensor, texts: Texts) -> Tensor:
    """Softmax attention in which several query heads share a key head.

    Args: query [n * count, heads, size], the rows of ``texts``; keys, values: the cache, [places, groups, size].
    Returns: as ``query``.
    """
    rows, count, groups, size = len(texts.places), texts.count, keys.shape[1], keys.shape[2]
    shared = query.shape[1] // groups
    query = (query * size**-0.5).reshape([rows, count, groups, shared, size]).transpose([0, 2, 3, 1, 4])
    keys, values = (_gather(part, texts).transpose([0, 2, 1, 3]) for part in (keys, values))
    query = query.reshape([rows, groups, shared * count, size])
    scores = paddle.matmul(query, keys, transpose_y=True).astype("float32")
    scores = scores.reshape([rows, groups, shared, count, texts.longest])
    scores = paddle.where(texts.mask.unsqueeze([1, 2]), scores, paddle.full([1], -1e30))
    weights = F.softmax(scores, axis=-1).astype(values.dtype).reshape([rows, groups, shared * count, texts.longest])
    mixed = paddle.matmul(weights, values).reshape([rows, groups, shared, count, size])
    return mixed.transpose([0, 3, 1, 2, 4]).reshape([rows * count, groups * shared, size])


def _gather(cache: Tensor, texts: Texts) -> Tensor:
    return paddle.gather(cache, texts.places.flatten()).reshape([len(texts.places), texts.longest, *cache.shape[1:]])


@dataclass(frozen=True)
class Operations:
    """What PaddleKernels compute with."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    attend: Callable[[Tensor, Tensor, Tensor, Texts], Tensor] = attend


def _fused_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return fused.fused_rms_norm(x, weight, None, epsilon, begin_norm_axis=x.ndim - 1)[0]


def _fused_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tables = (part.transpose([1, 0, 2]).unsqueeze(2).astype(x.dtype) for part in (sin, cos))  # [1, rows, 1, size]
    options = dict(zip(("sin", "cos"), tables, strict=True))
    return fused.fused_rotary_position_embedding(x.unsqueeze(0), use_neox_rotary_style=False, **options)[0].squeeze(0)


def _varlen_attend(query: Tensor, keys: Tensor, values: Tensor, texts: Texts) -> Tensor:
    keys, values = (paddle.gather(part, texts.flat) for part in (keys, values))
    longest = (texts.count, texts.longest)
    return flash_attn_unpadded(query, keys, values, *texts.starts, *longest, query.shape[-1] ** -0.5, causal=True)[0]


def _padded_attend(query: Tensor, keys: Tensor, values: Tensor, texts: Texts) -> Tensor:
    heads, size = query.shape[1:]
    keys, values = (_gather(part, texts).repeat_interleave(heads // part.shape[1], axis=2) for part in (keys, values))
    added = paddle.where(texts.mask.unsqueeze(1), paddle.zeros([1]), paddle.full([1], -1e30)).astype(query.dtype)
    query = query.reshape([-1, texts.count, heads, size])
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=added).reshape([-1, heads, size])


FUSED = (  # operation, kernel, the kernel as that operation; of several for one, the first that works is taken
    ("rms_norm", "fused_rms_norm", _fused_rms_norm),
    ("swiglu", "swiglu", lambda gate, up: F.swiglu(gate, up)),
    ("rotate", "fused_rotary_position_embedding", _fused_rotate),
    ("attend", "flash_attn_unpadded", _varlen_attend),
    ("attend", "scaled_dot_product_attention", _padded_attend),
)


# They exist for GPUs too, and why they are not used stands in docs/rollout.md.
LEFT_OUT = ("block_multihead_attention", "masked_multihead_attention", "top_p_sampling", "paddlenlp_ops")


def find_operations(dtype: str) -> tuple[Operations, list[str], list[str]]:
    """The fused kernels of the installed Paddle that give on this device what the plain operations give.

    Returns: operations; names of the kernels in use; "name (reason)" of those that are not.
    """
    plain, found, used, missing = Operations(), {}, [], []
    examples = _examples(dtype)
    for name, kernel, function in FUSED:
        if name in found:
            continue
        try:
            expected = getattr(plain, name)(*examples[name]).astype("float32")
            difference = float((function(*examples[name]).astype("float32") - expected).abs().max())
            if not difference <= _TOLERANCE[dtype]:
                raise ValueError(f"differs by {difference:.2g}")
        except Exception as error:  # a kernel that is not built in raises whatever it likes
            missing.append(f"{kernel} ({str(error).strip().splitlines()[0][:80] if str(error) else 'not built in'})")
            continue
        found[name] = function
        used.append(kernel)
    return replace(plain, **found), used, missing


def _examples(dtype: str) -> dict[str, tuple]:
    """Arguments of every operation, of the sizes that models have; the process's random state is left alone."""

    def numbers(*shape: int) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        return paddle.sin(paddle.arange(count, dtype="float32") * 0.7).reshape(list(shape)).astype(dtype)

    angles = paddle.arange(5, dtype="float32").reshape([5, 1, 1]) * paddle.linspace(0.1, 1, 32).tile([2])
    positions, slots = np.array([4, 5, 6, 1, 2, 3]), np.array([0, 0, 0, 1, 1, 1])
    texts = Texts(np.array([0, 3]), 3, positions, slots, np.arange(14).reshape([2, 7])[:, ::-1])
    return {
        "rms_norm": (numbers(5, 256), numbers(256), 1e-5),
        "swiglu": (numbers(5, 256), numbers(5, 256) * 0.5),
        "rotate": (numbers(5, 6, 64), angles.cos(), angles.sin()),
        "attend": (numbers(6, 6, 64), numbers(14, 2, 64), numbers(14, 2, 64) * 0.5, texts),
    }
