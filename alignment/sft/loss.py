"""Cross-entropy of labelled tokens: the loss of SFT, and of the language-model term (ptx) of PPO."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import paddle

from alignment.ppo.losses import IGNORED_LABEL, log_probs_from_logits
from alignment.ppo.models.policy import target_logits


def count_labels(items: Iterable[dict]) -> int:
    """Tokens that are predicted in items of a SupervisedDataset; a label in the first place has no token before it."""
    return sum(int((item["labels"][1:] != IGNORED_LABEL).sum()) for item in items)


def supervised_loss(model: paddle.nn.Layer, batch: dict[str, np.ndarray], denominator: float) -> paddle.Tensor:
    """-sum of the log-probabilities of a batch's labels, over ``denominator`` (count_labels of the optimizer step).

    Args: batch: of SupervisedDataset's collator: input_ids int64 [B, L], attention_mask bool [B, L], labels int64
        [B, L], not shifted, -100 where nothing is to be learnt.
    """
    ids, mask, wanted = (
        paddle.to_tensor(x) for x in (batch["input_ids"], batch["attention_mask"], batch["labels"] != IGNORED_LABEL)
    )
    return -log_probs_from_logits(*target_logits(model, ids, mask, wanted)).sum() / denominator
