"""Cross-entropy of labelled tokens: the loss of SFT, and of the language-model term (ptx) of PPO."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import paddle

from alignment.parallel.pipeline import MicroBatch
from alignment.ppo.losses import IGNORED_LABEL
from alignment.ppo.models.policy import pack, target_log_probs


def count_labels(items: Iterable[dict]) -> int:
    """Tokens that are predicted in items of a SupervisedDataset; a label in the first place has no token before it."""
    return sum(int((item["labels"][1:] != IGNORED_LABEL).sum()) for item in items)


def supervised_micro_batch(
    model: paddle.nn.Layer, batch: dict[str, np.ndarray], denominator: float, coefficient: float = 1.0
) -> MicroBatch:
    """-sum of the log-probabilities of a batch's labels, over ``denominator`` (count_labels of the optimizer step).

    Its report is that number and no rows; what is learnt is ``coefficient`` times it.

    Args: batch: of SupervisedDataset's collator: input_ids int64 [B, L], attention_mask bool [B, L], labels int64
        [B, L], not shifted, -100 where nothing is to be learnt.
    """
    columns = (batch["input_ids"], batch["attention_mask"], batch["labels"] != IGNORED_LABEL)
    packed = pack(*(paddle.to_tensor(column) for column in columns))

    def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, tuple[float, dict]]:
        loss = -target_log_probs(model, hidden, packed).sum() / denominator
        return coefficient * loss, (float(loss), {})

    return MicroBatch(packed.input_ids, packed.attention_mask, finish)
