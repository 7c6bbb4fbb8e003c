"""Reward modelling: which of two answers, or of several, do people prefer?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle

from alignment.parallel.pipeline import MicroBatch
from alignment.ppo.controllers import RunningMoments
from alignment.ppo.losses import masked_moments
from alignment.ppo.models.value import end_scores
from alignment.rm.evaluation import calibrate, coins_of, held_out_metrics, kind_metrics, roles_of
from alignment.rm.losses import (
    Objective,
    align_token_scores,
    compared_pairs,
    comparison_loss,
    pair_losses,
    score_regularization,
    token_pair_losses,
)
from alignment.rm.metrics import preference_metrics
from alignment.rm.plots import write_pictures
from alignment.runtime.faults import UsageError
from alignment.runtime.metrics import is_main_process
from alignment.training.batches import WeightedSchedule
from alignment.training.trainer import Arrays, StageTrainer


class RewardTrainer(StageTrainer):
    """Trains a score model on a data.ComparisonDataset. Metrics: loss, alignment.rm.metrics.preference_metrics, and
    those of alignment.rm.evaluation.

    Args:
        args: alignment.rm.arguments.TrainingArguments; the others as StageTrainer.
        normalizer: running statistics that scores are normalised by before the loss, or None. They are those of the
            steps before, so that neither accumulation nor the number of ranks changes a score.

    Attributes: temperature: what the saved model divides its scores by; None until it is fitted, if ever.
    """

    def __init__(self, args: Any, *others: Any, normalizer: RunningMoments | None = None, **more: Any) -> None:
        super().__init__(args, *others, **more)
        self.normalizer, self.temperature = normalizer, None
        self.objective = Objective(*(getattr(args, name) for name in Objective._fields))
        self.held_out: Arrays = {}  # rows of the latest evaluation
        if args.sampling_weights is not None:
            self.schedule = self._weighted(args.sampling_weights)
        if args.calibrate_scores and all(item["is_apo"] for item in self.eval_set):
            raise UsageError('"calibrate_scores": true needs held-out pairs that people compared; all are APO\'s')

    def length(self, item: dict) -> int:
        return max(map(len, item["input_ids"]))

    def count(self, items: Iterable[dict]) -> int:
        return sum(int((item["scores"][:, None] > item["scores"]).sum()) for item in items)

    def micro_batch(self, batch: Arrays, denominator: int) -> MicroBatch:
        """batch: collated comparisons of N answers in P pairs; rows: of the pairs, loss, better and worse (float32,
        normalised), is_apo, worse_first, source; of the answers, raw, score (normalised) and role."""
        ids, mask = (paddle.to_tensor(batch[name]) for name in ("input_ids", "attention_mask"))
        better, worse = compared_pairs(batch["item"], batch["scores"])
        item, coins = batch["item"][better], coins_of(batch["input_ids"], batch["attention_mask"])
        known = {
            "is_apo": batch["is_apo"][item],
            "source": batch["source"][item],
            "worse_first": coins[worse] < coins[better],
            "role": roles_of(batch),
        }
        # Without a weight of their own, APO's pairs are as all others.
        is_apo = paddle.to_tensor(known["is_apo"] & (self.objective.apo_loss_coeff > 0))
        pairs = paddle.to_tensor(better), paddle.to_tensor(worse)

        def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, tuple[float, Arrays]]:
            """The loss with its penalty, and the scores, from final hidden states [N, L, H]."""
            losses, penalty, rows = self._compare(hidden, ids, mask, pairs, is_apo, denominator)
            loss = comparison_loss(losses, is_apo, denominator, self.objective) + self.args.regularization * penalty
            return loss, (float(loss), {name: row.detach().numpy() for name, row in rows.items()} | known)

        return MicroBatch(ids, mask, finish)

    def _compare(
        self,
        hidden: paddle.Tensor,
        ids: paddle.Tensor,
        mask: paddle.Tensor,
        pairs: tuple[paddle.Tensor, paddle.Tensor],
        is_apo: paddle.Tensor,
        denominator: int,
    ) -> tuple[paddle.Tensor, paddle.Tensor, dict[str, paddle.Tensor]]:
        """Each pair's loss [P], the penalty (a scalar), and as rows the scores and those losses."""
        is_diff = is_apo if self.objective.apo_loss_type == "diff" else None
        if self.args.loss_type == "token-wise":
            raw = self.model.scores(hidden)
            scores = self._normalize(raw)
            tokens = align_token_scores(*(x[rows] for x in (scores, ids, mask) for rows in pairs))
            losses = token_pair_losses(tokens, is_diff)
            penalty = score_regularization(*tokens, denominator=denominator)
            raw, scores = end_scores(raw, mask), end_scores(scores, mask)
            better, worse = (scores[rows] for rows in pairs)
        else:
            raw = self.model.answer_scores(hidden, ids, mask)
            scores = self._normalize(raw)
            better, worse = (scores[rows] for rows in pairs)
            losses = pair_losses(better - worse, is_diff)
            penalty = score_regularization(better, worse, denominator=denominator)
        return losses, penalty, {"loss": losses, "better": better, "worse": worse, "raw": raw, "score": scores}

    def _normalize(self, raw: paddle.Tensor) -> paddle.Tensor:
        return raw if self.normalizer is None else self.normalizer.normalize(raw)

    def _weighted(self, weights: dict[str, float]) -> WeightedSchedule:
        """The schedule that draws by source; raises UsageError unless the weights fit the sources."""
        names = self.train_set.report.sources
        if set(weights) != set(names):
            raise UsageError(f'"sampling_weights": names {", ".join(weights)}; the data sets are {", ".join(names)}')
        known = list(dict.fromkeys(names))
        source = np.array([known.index(names[item["source"]]) for item in self.train_set])
        for place, name in enumerate(known):
            weight = weights[name]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise UsageError(f'"sampling_weights": {name}: {weight!r} is not a number >= 0')
            if weight > 0 and place not in source:
                raise UsageError(f'"sampling_weights": {name}: {weight}, but no sample of it is left')
        if sum(weights.values()) == 0:
            raise UsageError('"sampling_weights": at least one must be above 0')
        plain = self.schedule
        return WeightedSchedule(
            count=plain.count,
            batch_size=plain.batch_size,
            seed=plain.seed,
            drop_last=plain.drop_last,
            source=source,
            weights=[float(weights[name]) for name in known],
        )

    def describe(self, loss: float, rows: Arrays) -> dict[str, float]:
        return {"loss": loss, **preference_metrics(rows["better"], rows["worse"]), **kind_metrics(rows)}

    def evaluate(self) -> dict[str, float]:
        loss, self.held_out = self.run_held_out()
        metrics = self.describe(loss, self.held_out)
        return metrics | held_out_metrics(self.held_out, self.eval_set.report.sources)

    def _evaluate(self, step: int) -> dict[str, float]:
        """After the last step with the calibration, and pictures in output_dir."""
        metrics = super()._evaluate(step)
        if metrics and (step == self.total_steps or self.best.is_exhausted):
            if self.args.calibrate_scores:
                fitted = calibrate(self.held_out)
                self.temperature = fitted["calibration/temperature"]
                metrics |= {f"eval/{name}": value for name, value in fitted.items()}
            if is_main_process():
                write_pictures(self.held_out, self.output_dir, self.temperature)
        return metrics

    def finish_step(self, rows: Arrays) -> None:
        if self.normalizer is not None:
            raw = np.sort(rows["raw"].astype(np.float64))  # the ranks' order must not change a rounding
            self.normalizer.update(masked_moments(paddle.to_tensor(raw)))

    def save(self, step: int) -> None:
        """See StageTrainer.save; normaliser and temperature go into the model's config.json."""
        model, mean, variance = self.model, 0.0, 1.0
        if self.normalizer is not None and self.normalizer.variance > 0:
            mean, variance = self.normalizer.mean, self.normalizer.variance
        model.score_mean, model.score_var = mean, variance * (self.temperature or 1.0) ** 2
        model.do_normalize = self.normalizer is not None or self.temperature is not None
        super().save(step)
        model.do_normalize = False  # training normalises for itself

    def state_dict(self) -> dict:
        return {} if self.normalizer is None else {"normalizer": self.normalizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if (self.normalizer is None) != ("normalizer" not in state):
            had = "with" if "normalizer" in state else "without"
            raise UsageError(f'"normalize_score_during_training": the run to resume was trained {had} a normaliser')
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])
