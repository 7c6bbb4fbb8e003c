"""What the fused engine asks of the kernels that compute, whichever machine they are for."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import paddle

from alignment.ppo.rollout.decoder import Decoder
from alignment.ppo.rollout.protocol import SamplingParameters


class TokenDraws(NamedTuple):
    """m tokens to draw.

    rows         int64   [m]         row of the logits, which several draws may share
    slots        int64   [m]         row of ``seen``
    uniforms     float64 [m]         randomness in [0, 1)
    forbids_end  bool    [m]         whether the answer may not end yet
    seen         uint8   [slots, V]  1 for tokens of the prompt and the answer so far; None without a penalty
    """

    rows: np.ndarray
    slots: np.ndarray
    uniforms: np.ndarray
    forbids_end: np.ndarray
    seen: np.ndarray | None


class SampledTokens(NamedTuple):
    """tokens int64 [m]; log_probs, entropies float32 [m], of softmax(logits / temperature) before any filter."""

    tokens: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray


class Kernels(Protocol):
    """A model part with a cache of keys and values that has one place a token; a table leads from position to place.

    Hidden states [rows, hidden] are arrays of a kind that the kernels choose.
    """

    decoder: Decoder

    def begin(self, positions: np.ndarray, slots: np.ndarray, tables: np.ndarray) -> None:
        """Start a pass over rows of tokens.

        Args: positions, slots: int64 [rows], of each token in its text and whose table applies; tables: int32
            [slots, longest], the place in the cache of each position.
        """
        ...

    def embed(self, tokens: np.ndarray) -> Any:
        """Hidden states of tokens int64 [rows]."""
        ...

    def attention(self, layer: int, hidden: Any) -> Any:
        """Hidden states plus the attention layer's result, summed over the tensor-parallel group."""
        ...

    def mlp(self, layer: int, hidden: Any) -> Any:
        """Hidden states plus the feed-forward layer's result, summed over the tensor-parallel group."""
        ...

    def logits(self, hidden: Any) -> Any:
        """float32 [rows, columns] of the columns that are here, after the final norm."""
        ...

    def sample(self, logits: Any, draws: TokenDraws, sampling: SamplingParameters) -> SampledTokens:
        """Draw tokens from logits float32 [rows, V]."""
        ...

    def concat(self, parts: list[Any]) -> Any:
        """Rows of several arrays."""
        ...

    def from_tensor(self, tensor: paddle.Tensor) -> Any:
        """An array of the kernels' kind."""
        ...

    def to_tensor(self, array: Any) -> paddle.Tensor:
        """The other way."""
        ...
