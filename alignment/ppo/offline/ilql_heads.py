"""ILQL's heads: V, two Q and their slow copies.

They are float32 whatever the policy is: a target's step of size ``alpha`` would vanish in 16 bits. Where lm_head
divides the vocabulary over tensor-parallel processes, so do the Q heads.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Constant

from alignment.parallel.collectives import copy_to_tensor_group, sum_over_tensor_group
from alignment.ppo.losses import sum_last_axis
from alignment.ppo.models.lora import draw
from alignment.ppo.models.vocabulary import own_columns


class Head(nn.Layer):
    """Linear(H, 2H) - ReLU - Linear(2H, columns), as trlX's heads, in float32.

    Args: is_split: whether the columns are this process's part of more.
    """

    def __init__(self, hidden_size: int, columns: int, is_split: bool = False) -> None:
        super().__init__()
        zero = paddle.ParamAttr(initializer=Constant(0.0))
        self.inner = nn.Linear(hidden_size, 2 * hidden_size, zero, zero)
        self.outer = nn.Linear(2 * hidden_size, columns, zero, zero)
        self.to(dtype="float32")
        self.is_split = is_split
        for axis, parameter in ((1, self.outer.weight), (0, self.outer.bias)):
            parameter.is_distributed, parameter.split_axis = is_split, axis

    def forward(self, states: paddle.Tensor) -> paddle.Tensor:
        """[n, H] -> [n, columns], also within mixed precision in float32."""
        with paddle.amp.auto_cast(enable=False):
            inner = F.relu(self.inner(states))
            return self.outer(copy_to_tensor_group(inner) if self.is_split else inner)

    def of_tokens(self, states: paddle.Tensor, tokens: paddle.Tensor) -> paddle.Tensor:
        """The columns ``tokens`` (int64 [n], of the whole vocabulary) alone: [n], without computing the others."""
        with paddle.amp.auto_cast(enable=False):
            inner = F.relu(self.inner(states))
        weight, bias = self.outer.weight, self.outer.bias
        columns, mine = own_columns(tokens, weight.shape[1]) if self.is_split else (tokens, None)
        weights = paddle.gather(weight, columns, axis=1).transpose([1, 0])
        chosen = sum_last_axis(inner * weights) + paddle.gather(bias, columns)
        return chosen if mine is None else sum_over_tensor_group(paddle.where(mine, chosen, paddle.zeros_like(chosen)))


class IlqlHeads(nn.Layer):
    """V, two Q heads, and the targets: copies of these that follow slowly and that no gradient reaches.

    Args: columns: of the vocabulary that are here; is_split: whether there are more elsewhere.
    """

    def __init__(self, hidden_size: int, columns: int, is_split: bool) -> None:
        super().__init__()
        self.v = Head(hidden_size, 1)
        self.q = nn.LayerList(Head(hidden_size, columns, is_split) for _ in range(2))
        self.target_q = nn.LayerList(Head(hidden_size, columns, is_split) for _ in range(2))
        for parameter in self.target_q.parameters():
            parameter.trainable = False

    def initialize(self, seed: int) -> None:
        """Draw the first layer of V and both Q by ``seed``, differently; the second stays 0, so that Q = V = 0."""
        for name, head in (("v", self.v), ("q.0", self.q[0]), ("q.1", self.q[1])):
            weight = head.inner.weight
            weight.set_value(draw(list(weight.shape), seed, f"ilql.{name}"))
        self.move_targets(1.0)

    @paddle.no_grad()
    def move_targets(self, alpha: float) -> None:
        """Q_target <- alpha Q + (1 - alpha) Q_target."""
        for target, source in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
            target.lerp_(source, paddle.to_tensor(alpha, dtype=target.dtype))

    def values(self, states: paddle.Tensor) -> paddle.Tensor:
        """V, float32 [n], of final hidden states [n, H]."""
        return self.v(states.astype("float32")).squeeze(-1)

    def advantages(self, states: paddle.Tensor) -> paddle.Tensor:
        """min Q_target - V of every token that is here, float32 [n, columns]; states: [n, H]."""
        states = states.astype("float32")
        smaller = paddle.minimum(*(head(states) for head in self.target_q))
        return smaller - self.values(states).unsqueeze(-1)
