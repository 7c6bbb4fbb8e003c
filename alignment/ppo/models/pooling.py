"""Which final hidden states a reward model's score of prompt + answer is made of; padding never counts."""

from __future__ import annotations

import paddle

POOLING_TYPES = ("eos", "last", "average", "max")


def pool(
    hidden: paddle.Tensor,
    input_ids: paddle.Tensor,
    attention_mask: paddle.Tensor,
    pooling_type: str,
    eos_token_id: int | None = None,
) -> paddle.Tensor:
    """[B, H], one state a row of final hidden states [B, L, H].

    eos      the state of the last token, which is the end-of-text token where the answer has ended
    last     the state of the last token that is not the end-of-text token
    average  the mean of the states of all tokens, computed in float32
    max      their maximum, entry by entry

    Args:
        input_ids: int64 [B, L].
        attention_mask: bool [B, L], True at real tokens, at least one a row; padding may be on either side.
        eos_token_id: of the end-of-text token; "last" needs it.
    """
    if pooling_type == "average":
        real = attention_mask.unsqueeze(-1)
        states = hidden.astype("float32")
        total = paddle.where(real, states, paddle.zeros_like(states)).sum(axis=1)
        return (total / real.sum(axis=1).astype("float32")).astype(hidden.dtype)
    if pooling_type == "max":
        lowest = paddle.full_like(hidden, paddle.finfo(hidden.dtype).min)
        return paddle.where(attention_mask.unsqueeze(-1), hidden, lowest).max(axis=1)
    if pooling_type == "last":
        text = attention_mask & (input_ids != eos_token_id)
        attention_mask = paddle.where(text.any(axis=1, keepdim=True), text, attention_mask)
    return take(hidden, last_positions(attention_mask))


def last_positions(mask: paddle.Tensor) -> paddle.Tensor:
    """int64 [B]: where each row of a bool [B, L] is True for the last time."""
    positions = paddle.arange(mask.shape[1], dtype="int64")
    return paddle.where(mask, positions, paddle.zeros_like(positions)).max(axis=-1)


def take(values: paddle.Tensor, positions: paddle.Tensor) -> paddle.Tensor:
    """[B, ...]: of values [B, L, ...] those at one position a row, int64 [B]."""
    rows = paddle.arange(values.shape[0], dtype="int64")
    return paddle.gather_nd(values, paddle.stack([rows, positions], axis=1))
