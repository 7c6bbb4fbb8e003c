"""ILQL's optimizer steps on logged answers: policy and heads learn together, the target heads follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import paddle

from alignment.parallel.collectives import gather_objects
from alignment.parallel.pipeline import MicroBatch
from alignment.parallel.topology import topology
from alignment.ppo.collect import as_tensors, pack_experience
from alignment.ppo.experience import Experience
from alignment.ppo.losses import token_rewards
from alignment.ppo.offline.ilql_losses import ilql_loss
from alignment.ppo.offline.ilql_model import action_values
from alignment.training.batches import idle_rounds, own_micro_batches
from alignment.training.engine import TrainingEngine

TERMS = ("td", "expectile", "cql", "awac")
MEANS = {"val/q": "q", "val/target_q": "target_q", "val/value": "values", "policy/clipfrac_avg": "clipped"}


class IlqlLearner:
    """Owns a policy with heads. Every process is given the same answers and works on its share.

    Args:
        args: ilql_tau, gamma, ilql_cql_scale, ilql_awac_scale, ilql_awac_beta of the loss (see ``ilql_loss``);
            ilql_alpha, by how much the target heads move every ``steps_for_target_q_sync`` optimizer steps;
            per_device_train_batch_size and per_device_eval_batch_size, rows of a micro-batch.
        actor: engine of the policy, after ``add_heads``.
    """

    def __init__(self, args: Any, actor: TrainingEngine) -> None:
        self.args, self.actor = args, actor

    def update(self, experience: Experience, rows: np.ndarray, step: int) -> dict[str, float]:
        """Optimizer step number ``step`` of the run, from 1, on the answers ``rows``; returns its metrics.

        Args: experience: its ``scores`` are the rewards as they are to be learnt, on each answer's last token.
        Raises: RunError, with nothing learnt, if the gradient is not finite.
        """
        args, size = self.args, self.args.per_device_train_batch_size
        with self.actor.learning():
            micro_batches = self._micro_batches(experience, rows, size)
            reports = self.actor.accumulate(micro_batches, idle_rounds(len(rows), size))
            metrics = self._describe(reports) | {"actor/grad_norm": self.actor.step()["grad_norm"]}
        if step % args.steps_for_target_q_sync == 0 and topology().is_last_stage:
            self.actor.model.ilql_heads.move_targets(args.ilql_alpha)
        return metrics | {"lr": self.actor.learning_rate}

    def measure(self, experience: Experience) -> dict[str, float]:
        """The same metrics of all answers, where nothing is learnt."""
        rows = np.arange(len(experience))
        micro_batches = self._micro_batches(experience, rows, self.args.per_device_eval_batch_size)
        return self._describe(self.actor.pipeline.forward(micro_batches))

    def _micro_batches(self, experience: Experience, rows: np.ndarray, size: int) -> list[MicroBatch]:
        lengths, tokens = experience.attention_mask.sum(-1), float(experience.lengths[rows].sum())
        shares = own_micro_batches(rows.tolist(), lengths.__getitem__, size)
        return [self._micro_batch(experience.take(np.asarray(share)), tokens) for share in shares]

    def _micro_batch(self, part: Experience, tokens: float) -> MicroBatch:
        args, model = self.args, self.actor.model
        packed, mask = pack_experience(part)
        (scores,) = as_tensors(part.scores)
        rewards = token_rewards(scores, paddle.zeros(mask.shape), 0.0, mask)

        def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, dict[str, float]]:
            """The loss, and sums over its tokens, from final hidden states [B, L, H]."""
            loss, stats = ilql_loss(
                action_values(model, hidden, packed, mask), rewards, mask, args.ilql_tau, args.gamma,
                args.ilql_cql_scale, args.ilql_awac_scale, args.ilql_awac_beta, tokens,
            )  # fmt: skip
            return loss, {"loss": float(loss), **{name: float(value) for name, value in stats._asdict().items()}}

        return MicroBatch(packed.input_ids, packed.attention_mask, finish)

    def _describe(self, own: Sequence[dict[str, float]]) -> dict[str, float]:
        sums: Counter[str] = Counter()
        for report in chain(*gather_objects(own)):
            sums.update(report)
        tokens = sums["tokens"]
        return {
            "loss": sums["loss"],
            **{f"loss/{name}_avg": sums[name] / tokens for name in TERMS},
            **{metric: sums[name] / tokens for metric, name in MEANS.items()},
            "policy/effective_tokens": sums["weight"] ** 2 / sums["weight_sq"] if sums["weight_sq"] > 0 else 0.0,
        }
