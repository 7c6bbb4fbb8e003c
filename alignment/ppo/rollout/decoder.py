"""A Llama or Qwen2 model of PaddleNLP as fused kernels see it: the arrays of one layer after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from alignment.ppo.models.lora import effective_weight
from alignment.ppo.models.policy import trunk


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of this process's part of a layer, matrices [in, out], in the model's dtype.

    qkv and gate_up are matrices that are multiplied by the same rows; qkv_bias is empty without bias.
    """

    attention_norm: paddle.Tensor
    qkv: list[paddle.Tensor]
    qkv_bias: list[paddle.Tensor]
    output: paddle.Tensor
    mlp_norm: paddle.Tensor
    gate_up: list[paddle.Tensor]
    down: paddle.Tensor


@dataclass(frozen=True)
class Decoder:
    """This process's part of a model; ``heads``, ``groups`` (key/value heads) and ``inner`` count what is here.

    layers: read at each access: who packs one after the other never has all of a model's merged adapters in memory.
    norm, head: None but on the last stage. head: [hidden, columns], or [columns, hidden] where ``head_is_transposed``.
    """

    layers: Sequence[DecoderLayer]
    embed: Callable[[paddle.Tensor], paddle.Tensor]
    norm: paddle.Tensor | None
    head: paddle.Tensor | None
    head_is_transposed: bool
    hidden: int
    heads: int
    groups: int
    size: int
    inner: int
    columns: int
    epsilon: float
    dtype: str
    rotary: Callable[[int], tuple[np.ndarray, np.ndarray]]


def read_decoder(model: paddle.nn.Layer) -> Decoder:
    """The current weights of a model that ``alignment.ppo.models`` loaded, not copied unless adapters change them."""
    body, config, placement = trunk(model), model.config, model.placement
    size = config.hidden_size // config.num_attention_heads
    head = model.lm_head if placement.is_last else None
    columns = 0 if head is None else head.weight.shape[0 if head.transpose_y else 1]

    def rotary(length: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, float32 [length, size] each. Raises ValueError beyond the model's positions."""
        attention = next(iter(body.layers)).self_attn
        pair = attention.rotary_emb(paddle.zeros([1], dtype="float32"), seq_len=length)
        cos, sin = (np.ascontiguousarray(part.numpy().reshape([-1, size])[:length]) for part in pair)
        if len(cos) < length:
            raise ValueError(f"prompt and answer have up to {length} tokens, the model has {len(cos)} positions")
        return cos, sin

    return Decoder(
        layers=_Layers(list(body.layers)),
        embed=getattr(body, "embed_tokens", None),
        norm=body.norm.weight if placement.is_last else None,
        head=None if head is None else head.weight,
        head_is_transposed=head is not None and bool(head.transpose_y),
        hidden=config.hidden_size,
        heads=config.num_attention_heads // placement.tensor,
        groups=config.num_key_value_heads // placement.tensor,
        size=size,
        inner=config.intermediate_size // placement.tensor,
        columns=columns,
        epsilon=config.rms_norm_eps,
        dtype=config.dtype,
        rotary=rotary,
    )


class _Layers(Sequence):
    def __init__(self, layers: list[paddle.nn.Layer]) -> None:
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, number: int) -> DecoderLayer:
        return _read_layer(self.layers[number])


def _read_layer(layer: paddle.nn.Layer) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    return DecoderLayer(
        attention_norm=layer.input_layernorm.weight,
        qkv=[effective_weight(projection) for projection in projections],
        qkv_bias=[projection.bias for projection in projections if projection.bias is not None],
        output=effective_weight(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=[effective_weight(mlp.gate_proj), effective_weight(mlp.up_proj)],
        down=effective_weight(mlp.down_proj),
    )
