"""Reward modelling: which of two answers do people prefer?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from alignment.parallel.pipeline import MicroBatch
from alignment.ppo.controllers import RunningMoments
from alignment.ppo.losses import masked_moments
from alignment.ppo.models.value import end_scores
from alignment.rm.losses import align_token_scores, score_regularization, sequence_ranking_loss, token_ranking_loss
from alignment.rm.metrics import preference_metrics
from alignment.runtime.faults import UsageError
from alignment.training.trainer import Arrays, StageTrainer


class RewardTrainer(StageTrainer):
    """Trains a score model on a data.PreferenceDataset. Metrics: loss and alignment.rm.metrics.preference_metrics.

    Args:
        args: alignment.rm.arguments.TrainingArguments; the others as StageTrainer.
        normalizer: running statistics that scores are normalised by before the loss, or None. They are those of the
            steps before, so that neither accumulation nor the number of ranks changes a score.
    """

    def __init__(self, args: Any, *others: Any, normalizer: RunningMoments | None = None, **more: Any) -> None:
        super().__init__(args, *others, **more)
        self.normalizer = normalizer

    def length(self, item: dict) -> int:
        return max(len(item["better_input_ids"]), len(item["worse_input_ids"]))

    def count(self, items: Iterable[dict]) -> int:
        return sum(1 for _ in items)

    def micro_batch(self, batch: Arrays, denominator: float) -> MicroBatch:
        """batch: P pairs, collated; rows: better and worse float32 [P], normalised, and raw float32 [2P]."""
        names = ("better_input_ids", "worse_input_ids", "better_attention_mask", "worse_attention_mask")
        better_ids, worse_ids, better_mask, worse_mask = (paddle.to_tensor(batch[name]) for name in names)
        ids, mask = paddle.concat([better_ids, worse_ids]), paddle.concat([better_mask, worse_mask])

        def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, tuple[float, Arrays]]:
            """The ranking loss with its penalty, and the scores, from final hidden states [2P, L, H]."""
            raw = self.model.scores(hidden)
            scores = raw if self.normalizer is None else self.normalizer.normalize(raw)
            better, worse = paddle.split(end_scores(scores, mask), 2)
            if self.args.loss_type == "token-wise":
                tokens = align_token_scores(*paddle.split(scores, 2), better_ids, worse_ids, better_mask, worse_mask)
                loss = token_ranking_loss(tokens, denominator)
                penalty = score_regularization(*tokens, denominator=denominator)
            else:
                loss = sequence_ranking_loss(better, worse, denominator)
                penalty = score_regularization(better, worse, denominator=denominator)
            loss = loss + self.args.regularization * penalty
            rows = {"better": better, "worse": worse, "raw": end_scores(raw, mask)}
            return loss, (float(loss), {name: row.detach().numpy() for name, row in rows.items()})

        return MicroBatch(ids, mask, finish)

    def describe(self, loss: float, rows: Arrays) -> dict[str, float]:
        return {"loss": loss, **preference_metrics(rows["better"], rows["worse"])}

    def finish_step(self, rows: Arrays) -> None:
        if self.normalizer is not None:
            raw = np.sort(rows["raw"].astype(np.float64))  # the ranks' order must not change a rounding
            self.normalizer.update(masked_moments(paddle.to_tensor(raw)))

    def save(self, step: int) -> Path:
        if self.normalizer is not None and self.normalizer.variance > 0:
            self.model.score_mean, self.model.score_var = self.normalizer.mean, self.normalizer.variance
        self.model.do_normalize = self.normalizer is not None
        path = super().save(step)
        self.model.do_normalize = False  # training normalises for itself
        return path

    def state_dict(self) -> dict:
        return {} if self.normalizer is None else {"normalizer": self.normalizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if (self.normalizer is None) != ("normalizer" not in state):
            had = "with" if "normalizer" in state else "without"
            raise UsageError(f'"normalize_score_during_training": the run to resume was trained {had} a normaliser')
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])
