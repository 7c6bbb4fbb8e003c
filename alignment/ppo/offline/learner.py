"""APA, AWR and behaviour cloning on logged answers: measure once, fit the critic, improve the policy."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignment.ppo import losses
from alignment.ppo.offline.estimate import Estimator, no_targets
from alignment.ppo.offline.logged import LoggedAnswers
from alignment.ppo.offline.measure import LoggedCollector
from alignment.ppo.offline.objectives import (
    Objective,
    Sums,
    micro_batches,
    policy_micro_batch,
    sum_up,
    value_micro_batch,
)
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process
from alignment.training.batches import BatchSchedule, idle_rounds
from alignment.training.engine import TrainingEngine


class AdvantageLearner:
    """Learns from advantages of logged answers; an OfflineLearner (alignment.ppo.offline.trainer).

    Args:
        args: alignment.ppo.offline.arguments.TrainingArguments.
        actor: engine of the policy.
        critic: engine of the critic, or None where it is not trained.
        collector: measures; its critic is None where the objective needs none.
        schedule: which answers each optimizer step takes.
        train, held_out: logged answers; held_out may be None.
    """

    def __init__(
        self,
        args: Any,
        actor: TrainingEngine,
        critic: TrainingEngine | None,
        collector: LoggedCollector,
        schedule: BatchSchedule,
        train: LoggedAnswers,
        held_out: LoggedAnswers | None,
    ) -> None:
        self.args, self.actor, self.critic, self.collector = args, actor, critic, collector
        self.schedule, self.train, self.held_out = schedule, train, held_out
        self.engines = {"policy": actor} if critic is None else {"value": critic, "policy": actor}
        self.critic_steps = critic_steps(args, schedule)
        self.estimator = None if args.policy_loss == "bc" else Estimator(args)
        self.targets, self.critic_fit = no_targets(train.experience), {}
        self.answers = 0  # that the policy has learnt from
        self.decodings = {"": None}

    # ---- before the first step --------------------------------------------------------------------------------------

    def prepare(self, checkpoint: Path | None = None) -> None:
        """Measure what stays the same: scores, and log-probabilities of the initial policy.

        Args: checkpoint: the policy's, to take the training answers' measurements from.
        """
        if checkpoint is None:
            self._measure(self.train)
        else:
            self.train.load_measured(checkpoint)
        if self.held_out is not None:
            self._measure(self.held_out)
        if self.estimator is not None:
            self.estimator.fit_scores(self.train.experience.scores)
            if checkpoint is None and self.critic_steps == 0:
                self.collector.measure_values(self.train.experience)
            self.targets, self.critic_fit = self.estimator.fit(self.train.experience)

    def _measure(self, logged: LoggedAnswers) -> None:
        if self.estimator is not None:
            self.collector.score(logged)
        self.collector.measure_reference(logged.experience, self.args.temperature)

    # ---- learning ---------------------------------------------------------------------------------------------------

    def step(self, number: int) -> dict[str, float]:
        """Step ``number`` of the run, counted from 1, of the critic, the policy or both; returns its metrics."""
        done = number - 1 - self.critic_steps  # of the policy's steps
        if done < 0:
            return self._improve_critic(self.schedule(number - 1)) | self._describe_scores()
        if self._is_refresh_due(done):
            self.collector.measure_values(self.train.experience)
            self.targets, self.critic_fit = self.estimator.fit(self.train.experience)
        rows = self.schedule(done)
        metrics = self._improve_policy(rows) | self._describe_scores() | self._describe_advantages()
        if not self._learn_together:
            return metrics
        both = metrics | self._improve_critic(rows)
        if "skipped_steps" in both:
            both["skipped_steps"] += metrics["skipped_steps"]
        return both

    @property
    def _learn_together(self) -> bool:
        return self.critic is not None and self.critic_steps == 0

    def _is_refresh_due(self, done: int) -> bool:
        """Whether the critic has learnt what the next advantages should know."""
        if done == 0:
            return self.critic_steps > 0
        return self._learn_together and done % self.args.critic_refresh == 0

    def _improve_policy(self, rows: np.ndarray) -> dict[str, float]:
        sums, done = self._optimize(self.actor, policy_micro_batch, rows)
        self.answers += 0 if done.get("skipped_steps") else len(rows)
        metrics = {
            "logged/answers": self.answers,
            "loss/policy_avg": sums["policy"],
            "policy/approxkl_avg": sums["approxkl"] / sums["tokens"],
            "policy/clipfrac_avg": sums["clipped"] / sums["tokens"],
            "policy/entropy_avg": sums["entropy"] / sums["tokens"],
            "actor/grad_norm": done.pop("grad_norm"),
            **done,
        }
        if self.args.policy_loss == "awr":
            metrics["policy/effective_tokens"] = sums["weight"] ** 2 / sums["weight_sq"]
        return metrics

    def _improve_critic(self, rows: np.ndarray) -> dict[str, float]:
        sums, done = self._optimize(self.critic, value_micro_batch, rows)
        critic = {"critic/grad_norm": done.pop("grad_norm"), "critic/lr": done.pop("lr")}
        return {"loss/value_avg": sums["value"], **critic, **done}

    def _optimize(
        self, engine: TrainingEngine, objective: Objective, rows: np.ndarray
    ) -> tuple[Sums, dict[str, float]]:
        """One optimizer step on the given training answers; sums over all processes, and what the step returned."""
        size = self.args.per_device_train_batch_size
        own = partial(objective, self.args, engine.model)
        with engine.learning():
            parts = micro_batches(own, self.train.experience, self.targets, rows, size)
            sums = sum_up(engine.accumulate(parts, idle_rounds(len(rows), size)))
            return sums, engine.step(sums["policy"] + sums["value"])

    def _describe_scores(self) -> dict[str, float]:
        if self.estimator is None:
            return {}
        scores = self.estimator.scores
        return {"logged/score_mean": scores.mean, "logged/score_std": scores.variance**0.5}

    def _describe_advantages(self) -> dict[str, float]:
        if self.estimator is None:
            return {}
        return {
            "logged/advantage_std": losses.mean_variance(self.estimator.advantages)[1] ** 0.5,
            "critic/vf_explained_var": self.critic_fit["vf_explained_var"],
        }

    # ---- evaluation and checkpoints ---------------------------------------------------------------------------------

    def evaluate(self, number: int) -> dict[str, float]:
        """Metrics on the held-out answers after ``number`` steps, by the scale of the training answers.

        Before the policy's first step its advantages are not known yet where the critic learns first.
        """
        if self.held_out is None:
            return {}
        experience, targets, metrics = self.held_out.experience, no_targets(self.held_out.experience), {}
        if self.estimator is not None:
            self.collector.measure_values(experience)
            targets, fit = self.estimator.targets(experience)
            metrics = {f"eval/{name}": value for name, value in fit.items()}
        if number > self.critic_steps or self.critic_steps == 0:
            objective = partial(policy_micro_batch, self.args, self.actor.model)
            rows, size = np.arange(len(experience)), self.args.per_device_eval_batch_size
            parts = micro_batches(objective, experience, targets, rows, size)
            metrics["eval/loss"] = sum_up(self.actor.pipeline.forward(parts))["policy"]
        return metrics

    def state_dict(self) -> dict:
        """Plain JSON for trainer_state.json."""
        scores = None if self.estimator is None else self.estimator.scores.state_dict()
        return {"answers": self.answers, "scores": scores}

    def load_state_dict(self, state: dict) -> None:
        """Takes back what ``state_dict`` gave."""
        self.answers = state["answers"]

    def save_measured(self, files: Files) -> None:
        """Write what was measured on the training answers, so that resuming asks no reward source again."""
        if is_main_process():
            self.train.save_measured(files)


def critic_steps(args: Any, schedule: BatchSchedule) -> int:
    """Optimizer steps of the critic alone, before the policy's."""
    if args.policy_loss == "bc" or args.critic_training != "first":
        return 0
    return math.ceil(args.critic_epochs * schedule.steps_per_epoch)
