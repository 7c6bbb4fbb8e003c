"""The same arithmetic in a form that Paddle's CPU kernels are fast at.

Found with paddlepaddle 3.3.1 and paddlenlp 3.0.0b4 on SmolLM2-135M (benchmarks/cpu_kernels.py): PaddleNLP repeats the
key/value heads and transposes keys, both of which Paddle copies element by element, and squares by ``pow``. On GPUs
nothing is changed.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import paddle
import paddle.nn.functional as F


def speed_up_on_cpu(model: paddle.nn.Layer) -> None:
    """Let a Llama or Qwen2 model that was built on a CPU attend by groups and square by multiplying."""
    if not paddle.get_device().startswith("cpu"):
        return
    for layer in model.sublayers():
        kind = type(layer).__name__
        if kind.endswith("RMSNorm"):
            layer.forward = MethodType(_normalize, layer)
        elif hasattr(layer, "attn_func") and not layer.config.fuse_attention_qkv:
            layer.attn_func = attend_by_groups
            layer.num_key_value_groups = 1  # the heads of keys and values are not repeated


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
    query = (query * size**-0.5).reshape([batch, width, groups, heads // groups, size])
    query = query.transpose([0, 2, 3, 1, 4]).reshape([batch * groups, -1, size])
    key, value = (x.transpose([0, 2, 1, 3]).reshape([batch * groups, length, size]) for x in (key, value))
    scores = paddle.matmul(query, key, transpose_y=True).reshape([batch, heads, width, length]) + attention_mask
    weights = F.softmax(scores, axis=-1).reshape([batch * groups, -1, length])
    mixed = paddle.matmul(weights, value).reshape([batch, groups, heads // groups, width, size])
    rows = [batch * width] if sequence_parallel else [batch, width]
    return mixed.transpose([0, 3, 1, 2, 4]).reshape([*rows, heads * size])


def _normalize(self: paddle.nn.Layer, hidden_states: paddle.Tensor) -> paddle.Tensor:
    """Root-mean-square norm over the last axis."""
    variance = (hidden_states * hidden_states).mean(-1, keepdim=True)
    return paddle.rsqrt(variance + self.variance_epsilon) * hidden_states * self.weight
