"""The same arithmetic in a form that CPUs are fast at.

Found with paddlepaddle 3.3.1 and paddlenlp 3.0.0b4 on SmolLM2-135M (benchmarks/cpu_kernels.py): PaddleNLP repeats the
key/value heads and transposes keys, both of which Paddle copies element by element, and squares by ``pow``; what
Paddle computes between matrix products takes as long as they do. With a C++ compiler the kernels of alignment.native
do the latter. On GPUs nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from types import MethodType
from typing import Any

import paddle
import paddle.nn.functional as F
from paddlenlp.transformers.llama import modeling as llama
from paddlenlp.transformers.qwen2 import modeling as qwen2

from alignment.native import operations
from alignment.native.build import BuildError, load_library
from alignment.runtime.console import say


def speed_up_on_cpu(model: paddle.nn.Layer) -> None:
    """Let a float32 Llama or Qwen2 model that was built on a CPU compute as this module does."""
    if not paddle.get_device().startswith("cpu"):
        return
    compiled = has_kernels()
    for layer in model.sublayers():
        kind = type(layer).__name__
        if kind.endswith("RMSNorm"):
            layer.forward = MethodType(_normalize_compiled if compiled else _normalize, layer)
        elif kind.endswith("MLP") and compiled and not layer.fuse_attention_ffn:
            layer.forward = MethodType(_feed_forward, layer)
        elif hasattr(layer, "attn_func") and not layer.config.fuse_attention_qkv:
            layer.attn_func = attend_by_groups
            layer.num_key_value_groups = 1  # the heads of keys and values are not repeated
    if compiled:
        _rotate_compiled()


@cache
def has_kernels() -> bool:
    """Whether the compiled kernels can be used; if not, why is said once."""
    try:
        load_library()
    except BuildError as error:
        say(f"models: plain Paddle operations, for {error}: slower")
        return False
    return True


@cache
def _rotate_compiled() -> None:
    """PaddleNLP calls this function by its module's name, and offers no other place."""
    for module in (llama, qwen2):
        module.apply_rotary_pos_emb = _rotation_or(module.apply_rotary_pos_emb)


def _rotation_or(own: Callable[..., tuple[paddle.Tensor, paddle.Tensor]]) -> Callable[..., Any]:
    @wraps(own)
    def rotate(
        query: paddle.Tensor, key: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, position_ids: paddle.Tensor
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        if not query.place.is_cpu_place() or query.dtype != paddle.float32 or position_ids is None:
            return own(query, key, cos, sin, position_ids)
        return tuple(operations.rotate(x, cos, sin, position_ids) for x in (query, key))

    return rotate


def attend_by_groups(
    query: paddle.Tensor,
    config: Any,
    key: paddle.Tensor,
    value: paddle.Tensor,
    attention_mask: paddle.Tensor,
    *_: Any,
    sequence_parallel: bool = False,
    **__: Any,
) -> paddle.Tensor:
    """Softmax attention in which the H / G query heads that share a key head are rows of one matrix product.

    Args: query float32 [B, Q, H, D]; key, value float32 [B, L, G, D]; attention_mask float32 [B, 1, Q, L], added.
    Returns: float32 [B, Q, H * D], or [B * Q, H * D] for ``sequence_parallel``. (``config`` and the other arguments
        are PaddleNLP's; none applies on a CPU.)
    """
    batch, width, heads, size = query.shape
    length, groups = key.shape[1:3]
    query = query.reshape([batch, width, groups, heads // groups, size])
    query = query.transpose([0, 2, 3, 1, 4]).reshape([batch * groups, -1, size])
    key, value = (x.transpose([0, 2, 1, 3]).reshape([batch * groups, length, size]) for x in (key, value))
    scores = paddle.matmul(query, key, transpose_y=True).reshape([batch, heads, width, length])
    softmax = operations.masked_softmax if has_kernels() else _masked_softmax
    weights = softmax(scores, attention_mask, size**-0.5).reshape([batch * groups, -1, length])
    mixed = paddle.matmul(weights, value).reshape([batch, groups, heads // groups, width, size])
    rows = [batch * width] if sequence_parallel else [batch, width]
    return mixed.transpose([0, 3, 1, 2, 4]).reshape([*rows, heads * size])


def _masked_softmax(scores: paddle.Tensor, mask: paddle.Tensor, scale: float) -> paddle.Tensor:
    return F.softmax(scores * scale + mask, axis=-1)


def _normalize(self: paddle.nn.Layer, hidden_states: paddle.Tensor) -> paddle.Tensor:
    """Root-mean-square norm over the last axis."""
    variance = (hidden_states * hidden_states).mean(-1, keepdim=True)
    return paddle.rsqrt(variance + self.variance_epsilon) * hidden_states * self.weight


def _normalize_compiled(self: paddle.nn.Layer, hidden_states: paddle.Tensor) -> paddle.Tensor:
    return operations.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _feed_forward(self: paddle.nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    return self.down_proj(operations.swiglu(self.gate_proj(x), self.up_proj(x)))
