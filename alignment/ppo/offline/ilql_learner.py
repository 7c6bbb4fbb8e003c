"""ILQL on logged answers: policy and heads learn together, the target heads follow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from alignment.parallel.pipeline import MicroBatch
from alignment.parallel.topology import topology
from alignment.ppo.collect import as_tensors, pack_experience
from alignment.ppo.controllers import RunningMoments
from alignment.ppo.experience import Experience, Targets
from alignment.ppo.losses import masked_moments, token_rewards
from alignment.ppo.offline.estimate import no_targets
from alignment.ppo.offline.ilql_losses import ilql_loss
from alignment.ppo.offline.ilql_model import action_values, advantage_shift, save_heads
from alignment.ppo.offline.logged import LoggedAnswers
from alignment.ppo.offline.measure import LoggedCollector
from alignment.ppo.offline.objectives import Sums, micro_batches, sum_up
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process
from alignment.training.batches import BatchSchedule, idle_rounds
from alignment.training.engine import TrainingEngine

TERMS = ("td", "expectile", "cql", "awac")
MEANS = {"ilql/q": "q", "ilql/target_q": "target_q", "ilql/value": "values", "policy/clipfrac_avg": "clipped"}


def ilql_micro_batch(args: Any, model: paddle.nn.Layer, part: Experience, _: Targets, tokens: float) -> MicroBatch:
    """The loss on some answers, whose ``scores`` are the rewards of their last tokens as they are to be learnt."""
    packed, mask = pack_experience(part)
    (scores,) = as_tensors(part.scores)
    rewards = token_rewards(scores, paddle.zeros(mask.shape), 0.0, mask)

    def finish(hidden: paddle.Tensor) -> tuple[paddle.Tensor, Sums]:
        """The loss from final hidden states [B, L, H], and sums over its tokens."""
        loss, stats = ilql_loss(
            action_values(model, hidden, packed, mask), rewards, mask, args.ilql_tau, args.gamma,
            args.ilql_cql_scale, args.ilql_awac_scale, args.ilql_awac_beta, tokens,
        )  # fmt: skip
        return loss, Sums({"ilql": float(loss), **{name: float(value) for name, value in stats._asdict().items()}})

    return MicroBatch(packed.input_ids, packed.attention_mask, finish)


class IlqlLearner:
    """An OfflineLearner (alignment.ppo.offline.trainer) of a policy with heads.

    Args:
        args: alignment.ppo.offline.arguments.TrainingArguments.
        actor: engine of the policy, after ``add_heads``.
        collector: scores answers.
        schedule: which answers each optimizer step takes.
        train, held_out: logged answers; held_out may be None.
    """

    critic_steps = 0

    def __init__(
        self,
        args: Any,
        actor: TrainingEngine,
        collector: LoggedCollector,
        schedule: BatchSchedule,
        train: LoggedAnswers,
        held_out: LoggedAnswers | None,
    ) -> None:
        self.args, self.actor, self.collector, self.schedule = args, actor, collector, schedule
        self.train, self.held_out = train, held_out
        self.engines = {"policy": actor}
        first, *others = args.ilql_decoding_beta
        betas = {"": first} | {f"beta_{beta:g}": beta for beta in others}
        self.decodings = {name: advantage_shift(actor.model, beta) for name, beta in betas.items()}
        self.objective = partial(ilql_micro_batch, args, actor.model)
        self.scores = RunningMoments()  # of the training answers
        self.answers = 0  # learnt from

    def prepare(self, checkpoint: Path | None = None) -> None:
        """Score the answers; the scale is that of the training answers. checkpoint: to take their scores from."""
        if checkpoint is None:
            self.collector.score(self.train)
        else:
            self.train.load_measured(checkpoint)
        self.scores.update(masked_moments(paddle.to_tensor(self.train.experience.scores)))
        self.experience = self._scaled(self.train)
        if self.held_out is not None:
            self.collector.score(self.held_out)

    def _scaled(self, logged: LoggedAnswers) -> Experience:
        """The answers with their scores as they are learnt."""
        scores, bound = logged.experience.scores, self.args.clip_range_score
        if self.args.normalize_reward:
            scores = self.scores.normalize(paddle.to_tensor(scores)).numpy()
        return replace(logged.experience, scores=scores.clip(-bound, bound))

    def step(self, number: int) -> dict[str, float]:
        """Optimizer step ``number``, counted from 1; returns its metrics.

        Raises: RunError, with nothing learnt, if the gradient is not finite.
        """
        args, rows = self.args, self.schedule(number - 1)
        size = args.per_device_train_batch_size
        with self.actor.learning():
            parts = micro_batches(self.objective, self.experience, no_targets(self.experience), rows, size)
            sums = sum_up(self.actor.accumulate(parts, idle_rounds(len(rows), size)))
            done = self.actor.step(sums["ilql"])
            taken = not done.get("skipped_steps")
            if taken and number % args.steps_for_target_q_sync == 0 and topology().is_last_stage:
                self.actor.model.ilql_heads.move_targets(args.ilql_alpha)
        self.answers += len(rows) * taken
        return {
            "logged/answers": self.answers,
            "logged/score_mean": self.scores.mean,
            "logged/score_std": self.scores.variance**0.5,
            "loss/ilql_avg": sums["ilql"],
            **{f"loss/{name}_avg": sums[name] / sums["tokens"] for name in TERMS},
            **{metric: sums[name] / sums["tokens"] for metric, name in MEANS.items()},
            "policy/effective_tokens": sums["weight"] ** 2 / sums["weight_sq"] if sums["weight_sq"] > 0 else 0.0,
            "actor/grad_norm": done.pop("grad_norm"),
            **done,
        }

    def evaluate(self, number: int) -> dict[str, float]:
        """The loss and its terms on the held-out answers, on the scale of the training answers."""
        if self.held_out is None:
            return {}
        experience = self._scaled(self.held_out)
        rows, size = np.arange(len(experience)), self.args.per_device_eval_batch_size
        parts = micro_batches(self.objective, experience, no_targets(experience), rows, size)
        sums = sum_up(self.actor.pipeline.forward(parts))
        return {"eval/loss": sums["ilql"], **{f"eval/{name}_loss": sums[name] / sums["tokens"] for name in TERMS}}

    def state_dict(self) -> dict:
        """Plain JSON for trainer_state.json."""
        return {"answers": self.answers, "scores": self.scores.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Takes back what ``state_dict`` gave."""
        self.answers = state["answers"]

    def save_measured(self, files: Files) -> None:
        """Write the heads, and what was measured on the training answers."""
        save_heads(self.actor.model, files)
        if is_main_process():
            self.train.save_measured(files)
