"""Kernels of Paddle operations over the model's own weights: for GPUs, and for CPUs without a C++ compiler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle

from alignment.ppo.losses import entropy_from_logits, log_probs_from_logits
from alignment.ppo.rollout.decoder import Decoder, DecoderLayer
from alignment.ppo.rollout.kernels import SampledTokens, TokenDraws
from alignment.ppo.rollout.operations import Operations, Texts
from alignment.ppo.rollout.protocol import SamplingParameters
from alignment.ppo.rollout.sampling import choose_tokens, mark_broken, sampling_logits

new_cache = paddle.empty


class PaddleKernels:
    """See alignment.ppo.rollout.kernels.Kernels; hidden states are tensors of the model's dtype."""

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        places: int,
        longest: int,
        sum_parts: Callable[[paddle.Tensor], None] | None,
        operations: Operations,
    ) -> None:
        self.decoder, self.sum_parts, self.operations = decoder, sum_parts, operations
        self.layers = list(decoder.layers)
        self.table = tuple(paddle.to_tensor(part) for part in decoder.rotary(longest))
        cache = [places, decoder.groups, decoder.size]
        self.keys, self.values = (
            [new_cache(cache, dtype=decoder.dtype) for _ in self.layers] for _ in range(2)
        )

    def begin(self, positions: np.ndarray, slots: np.ndarray, tables: np.ndarray) -> None:
        """See Kernels.begin."""
        self.places = paddle.to_tensor(tables[slots, positions], dtype="int64")
        self.rotary = [part[paddle.to_tensor(positions)].unsqueeze(1) for part in self.table]
        starts = np.flatnonzero(np.diff(slots, prepend=-1))
        counts = np.diff(starts, append=len(slots))
        self.singles = Texts(starts[counts == 1], 1, positions, slots, tables)
        self.pieces = [Texts([start], count, positions, slots, tables) for start, count in
                       zip(starts[counts > 1], counts[counts > 1], strict=True)]  # fmt: skip

    def embed(self, tokens: np.ndarray) -> paddle.Tensor:
        """See Kernels.embed."""
        return self.decoder.embed(paddle.to_tensor(tokens))

    def attention(self, layer: int, hidden: paddle.Tensor) -> paddle.Tensor:
        """See Kernels.attention."""
        d, weights = self.decoder, self.layers[layer]
        normed = self.operations.rms_norm(hidden, weights.attention_norm, d.epsilon)
        parts = [paddle.matmul(normed, weight) for weight in weights.qkv]
        if weights.qkv_bias:
            parts = [part + bias for part, bias in zip(parts, weights.qkv_bias, strict=True)]
        qkv = paddle.concat(parts, axis=1).reshape([len(hidden), d.heads + 2 * d.groups, d.size])
        rotated = self.operations.rotate(qkv[:, : d.heads + d.groups], *self.rotary)
        self.keys[layer][self.places] = rotated[:, d.heads :]
        self.values[layer][self.places] = qkv[:, d.heads + d.groups :]
        mixed = paddle.empty([len(hidden), d.heads, d.size], dtype=hidden.dtype)
        for texts in [self.singles, *self.pieces]:
            if len(texts.rows):
                query = paddle.gather(rotated[:, : d.heads], texts.rows)
                mixed[texts.rows] = self.operations.attend(query, self.keys[layer], self.values[layer], texts)
        return self._add(hidden, paddle.matmul(mixed.flatten(1), weights.output))

    def mlp(self, layer: int, hidden: paddle.Tensor) -> paddle.Tensor:
        """See Kernels.mlp."""
        weights: DecoderLayer = self.layers[layer]
        normed = self.operations.rms_norm(hidden, weights.mlp_norm, self.decoder.epsilon)
        inner = self.operations.swiglu(*(paddle.matmul(normed, weight) for weight in weights.gate_up))
        return self._add(hidden, paddle.matmul(inner, weights.down))

    def logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """See Kernels.logits."""
        d = self.decoder
        normed = self.operations.rms_norm(hidden, d.norm, d.epsilon)
        return paddle.matmul(normed, d.head, transpose_y=d.head_is_transposed).astype("float32")

    def sample(self, logits: paddle.Tensor, draws: TokenDraws, sampling: SamplingParameters) -> SampledTokens:
        """See Kernels.sample."""
        logits = paddle.gather(logits, paddle.to_tensor(draws.rows))
        seen = None if draws.seen is None else paddle.to_tensor(draws.seen[draws.slots].astype(bool))
        shaped = sampling_logits(logits, seen, paddle.to_tensor(draws.forbids_end), sampling)
        tokens = choose_tokens(shaped, paddle.to_tensor(draws.uniforms), sampling.temperature == 0)
        tokens = mark_broken(tokens, logits)
        temperature = sampling.temperature or 1.0
        log_probs = log_probs_from_logits(logits, tokens.clip(min=0), temperature)
        entropies = entropy_from_logits(logits, temperature)
        return SampledTokens(*(part.numpy() for part in (tokens, log_probs, entropies)))

    def concat(self, parts: list[paddle.Tensor]) -> paddle.Tensor:
        """See Kernels.concat."""
        return paddle.concat(parts)

    def from_tensor(self, tensor: paddle.Tensor) -> paddle.Tensor:
        """See Kernels.from_tensor."""
        return tensor

    def to_tensor(self, array: paddle.Tensor) -> paddle.Tensor:
        """See Kernels.to_tensor."""
        return array

    def _add(self, hidden: paddle.Tensor, part: paddle.Tensor) -> paddle.Tensor:
        if self.sum_parts is not None:
            self.sum_parts(part)
        return hidden + part
