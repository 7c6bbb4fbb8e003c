"""Log-probabilities of whole answers."""

from __future__ import annotations

import numpy as np
import paddle

from alignment.ppo.models.policy import Packed, pack, target_log_probs


def longest(item: dict) -> int:
    """Tokens of an item's longest answer, prompt included."""
    return max(map(len, item["input_ids"]))


def pack_answers(batch: dict[str, np.ndarray]) -> tuple[Packed, paddle.Tensor]:
    """A batch of data.ComparisonCollator, ready to run, the answers' tokens being targets; and their number.

    Returns: Packed of N rows, float32 [N]. A first token, which nothing precedes, is no target.
    """
    start = np.maximum(batch["prompt_length"], 1)[:, None]
    answers = batch["attention_mask"] & (np.arange(batch["input_ids"].shape[1]) >= start)
    packed = pack(*(paddle.to_tensor(column) for column in (batch["input_ids"], batch["attention_mask"], answers)))
    return packed, packed.target_mask.sum(axis=1).astype("float32")


def answer_log_probs(model: paddle.nn.Layer, hidden: paddle.Tensor, packed: Packed) -> paddle.Tensor:
    """float32 [N]: sums of the log-probabilities of each answer's tokens, end of text included.

    Args: hidden: final hidden states [N, L, H] of ``packed``, which pack_answers gave.
    """
    mask = packed.target_mask
    return paddle.scatter_nd(paddle.nonzero(mask), target_log_probs(model, hidden, packed), mask.shape).sum(axis=1)
