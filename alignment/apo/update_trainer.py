"""Policy updates from scored answers: learn the best (RJS), rank all (RRHF), or compare with the start (DPO, IPO)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle

from alignment.apo.answers import answer_log_probs, longest, pack_answers
from alignment.apo.update_losses import best_answer_loss, dpo_loss, find_best, ipo_loss, ranking_loss
from alignment.apo.update_reference import load_reference, measure_reference, save_reference
from alignment.parallel.pipeline import MicroBatch
from alignment.rm.losses import Pairs, compared_pairs
from alignment.rm.metrics import preference_accuracy
from alignment.runtime.console import say
from alignment.runtime.files import Files
from alignment.sft.trainer import SFTTrainer
from alignment.training.trainer import Arrays, StageTrainer

SIDES = ("chosen", "rejected")
ROUNDING = 1e-3  # nats; a policy that is still the initial one differs from it by less, and has accuracy 0.5


class AnswersTrainer(StageTrainer):
    """Trains a policy on whole answers, from data.ComparisonDataset's items; a batch size counts items."""

    def length(self, item: dict) -> int:
        return longest(item)

    def micro_batch(self, batch: Arrays, denominator: float) -> MicroBatch:
        """batch: N answers, collated; rows: see ``objective``."""
        packed, lengths = pack_answers(batch)
        pairs = compared_pairs(batch["item"], batch["scores"])

        def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, tuple[float, Arrays]]:
            log_probs = answer_log_probs(self.model, hidden, packed)
            loss, rows = self.objective(log_probs, lengths, pairs, batch, denominator)
            return loss, (float(loss), rows)

        return MicroBatch(packed.input_ids, packed.attention_mask, finish)

    @abstractmethod
    def objective(
        self, log_probs: paddle.Tensor, lengths: paddle.Tensor, pairs: Pairs, batch: Arrays, denominator: float
    ) -> tuple[paddle.Tensor, Arrays]:
        """The loss and the rows for ``describe``, from the answers' log-probabilities and tokens, float32 [N]."""


class RRHFTrainer(AnswersTrainer):
    """Trains on a RankedDataset by RRHF. Metrics: loss, rank_loss, sft_loss; accuracy and logps/* of pairs, by
    log-probabilities per token."""

    def count(self, items: Iterable[dict]) -> int:
        return sum(1 for _ in items)

    def objective(
        self, log_probs: paddle.Tensor, lengths: paddle.Tensor, pairs: Pairs, batch: Arrays, denominator: float
    ) -> tuple[paddle.Tensor, Arrays]:
        """See AnswersTrainer.objective; ranking and cross-entropy of log-probabilities per token."""
        per_token, best = log_probs / lengths, find_best(batch["item"], batch["scores"])
        ranking = ranking_loss(per_token, pairs, denominator)
        loss = ranking + self.args.rrhf_sft_coeff * best_answer_loss(per_token, best, denominator)
        values = per_token.detach().numpy()
        return loss, {"chosen": values[pairs.better], "rejected": values[pairs.worse], "best": values[best]}

    def describe(self, loss: float, rows: Arrays) -> dict[str, float]:
        """See StageTrainer.describe; rows: log-probabilities per token, of pairs and of the best answers."""
        chosen, rejected, best = (rows[name].astype(np.float64) for name in ("chosen", "rejected", "best"))
        metrics = {
            "loss": loss,
            "rank_loss": float(np.maximum(rejected - chosen, 0).sum() / len(best)),
            "sft_loss": -float(best.mean()),
        }
        if len(chosen):  # else no answer of these is better than another
            metrics |= {"accuracy": preference_accuracy(chosen, rejected), **_means("logps", chosen, rejected)}
        return metrics


class DPOTrainer(AnswersTrainer):
    """Trains on a ReferencedDataset by DPO or IPO. Metrics: loss; of the pairs accuracy and rewards/*, by implicit
    rewards dpo_beta log(pi / ref), logps/*, and log_ratio, the mean of log(pi / ref), all over whole answers."""

    def count(self, items: Iterable[dict]) -> int:
        return sum(len(compared_pairs(np.zeros(len(item["scores"])), item["scores"]).better) for item in items)

    def objective(
        self, log_probs: paddle.Tensor, lengths: paddle.Tensor, pairs: Pairs, batch: Arrays, denominator: float
    ) -> tuple[paddle.Tensor, Arrays]:
        """See AnswersTrainer.objective; the margins are those of log(pi / ref), whole answers."""
        args, log_ratios = self.args, log_probs - paddle.to_tensor(batch["reference"])
        margins = log_ratios[pairs.better] - log_ratios[pairs.worse]
        if args.dpo_loss_type == "ipo":
            loss = ipo_loss(margins, args.dpo_beta, denominator)
        else:
            loss = dpo_loss(margins, args.dpo_beta, denominator, args.label_smoothing)
        rows = {"log_probs": log_probs.detach().numpy(), "log_ratios": log_ratios.detach().numpy()}
        places = {"chosen": pairs.better, "rejected": pairs.worse}
        return loss, {f"{side}_{name}": row[places[side]] for name, row in rows.items() for side in SIDES}

    def describe(self, loss: float, rows: Arrays) -> dict[str, float]:
        """See StageTrainer.describe; rows: log-probabilities and log-ratios [P] of either side of the pairs."""
        log_probs, log_ratios = (
            [rows[f"{side}_{name}"].astype(np.float64) for side in SIDES] for name in ("log_probs", "log_ratios")
        )
        margins = log_ratios[0] - log_ratios[1]
        return {
            "loss": loss,
            "accuracy": preference_accuracy(np.where(np.abs(margins) < ROUNDING, 0.0, margins), 0.0),
            **_means("rewards", *(self.args.dpo_beta * values for values in log_ratios)),
            **_means("logps", *log_probs),
            "log_ratio": float(np.mean(log_ratios)),
        }

    def collect_files(self, files: Files) -> None:
        super().collect_files(files)
        save_reference(files, self._measured())

    def _resume(self) -> int:
        start = super()._resume()
        if self.checkpoint is not None:
            load_reference(self.checkpoint, self._measured())
            return start
        say("measuring the answers under the initial policy")  # minutes, for many of them
        for dataset in self._measured().values():
            measure_reference(self.engine.pipeline, dataset, self.args.per_device_eval_batch_size)
        return start

    def data_sets(self) -> dict[str, Any]:
        """See StageTrainer.data_sets; the held-out ones too have their reference in checkpoints."""
        return super().data_sets() | {"eval_datasets": self.eval_set}

    def _measured(self) -> dict[str, Any]:
        return {key: dataset for key, dataset in self.data_sets().items() if dataset is not None}


TRAINERS = {"rjs": SFTTrainer, "rrhf": RRHFTrainer, "dpo": DPOTrainer}


def _means(name: str, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Means over pairs, float64 [P]."""
    high, low = float(chosen.mean()), float(rejected.mean())
    return {f"{name}/chosen": high, f"{name}/rejected": low, f"{name}/margin": high - low}
