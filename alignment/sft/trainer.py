"""Supervised fine-tuning: cross-entropy on the assistants' answers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from alignment.parallel.pipeline import MicroBatch
from alignment.sft.loss import count_labels, supervised_micro_batch
from alignment.training.trainer import Arrays, StageTrainer


class SFTTrainer(StageTrainer):
    """Trains a policy on a data.SupervisedDataset. Metrics: loss (nats per label token), perplexity."""

    def length(self, item: dict) -> int:
        return len(item["input_ids"])

    def count(self, items: Iterable[dict]) -> int:
        return count_labels(items)

    def micro_batch(self, batch: Arrays, denominator: float) -> MicroBatch:
        return supervised_micro_batch(self.model, batch, denominator)

    def describe(self, loss: float, rows: Arrays) -> dict[str, float]:
        return {"loss": loss, "perplexity": math.exp(min(loss, 100.0))}
