"""Online RL from human feedback: rollout -> score -> estimate -> update -> record."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import paddle

from alignment.parallel.topology import topology
from alignment.ppo.collect import Collected, Collector
from alignment.ppo.controllers import AdaptiveKLController, FixedKLController, ScoreScaler
from alignment.ppo.estimate import describe_rollout, estimate
from alignment.ppo.evaluation import EVALUATION, describe_answers, record_samples
from alignment.ppo.experience import Experience
from alignment.ppo.frozen import FROZEN
from alignment.ppo.judge import WinRate
from alignment.ppo.learner import Learner, steps_per_iteration
from alignment.ppo.load import Models
from alignment.ppo.models.saving import collect_model
from alignment.ppo.nonfinite import describe_bad_answers
from alignment.ppo.offload import Offload
from alignment.ppo.reference_answers import ReferenceScores
from alignment.ppo.reshard import Sampler
from alignment.ppo.rollout.protocol import SamplingParameters
from alignment.ppo.self_check import check_reference
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process, keep_steps
from alignment.runtime.timing import peak_memory_gb
from alignment.runtime.whereabouts import in_phase
from alignment.training.batches import BatchSchedule
from alignment.training.best import BestTracker
from alignment.training.checkpoint import content, load_training_state
from alignment.training.engine import OptimizerSettings, TrainingEngine
from alignment.training.loop import run_loop
from alignment.training.nonfinite import Guard, check_state
from alignment.training.same_data import DATA, fingerprints
from alignment.training.setup import SAMPLES_FILE, total_steps
from alignment.training.writer import CheckpointWriter

PARTS = ("policy", "value")


class PPOTrainer:
    """Trains a policy on its own samples.

    Args:
        args: alignment.ppo.arguments.TrainingArguments.
        models: see ``Models``.
        offload: knows the frozen models already; actor and critic join here.
        sampling: how answers are drawn.
        prompts, eval_prompts: data.PromptOnlyDataset; eval_prompts may be None.
        ptx_set: data.SupervisedDataset of the language-model term, or None.
        checkpoint: ``policy/checkpoint-N`` to resume from, or None.
    """

    def __init__(
        self,
        args: Any,
        models: Models,
        offload: Offload,
        sampling: SamplingParameters,
        prompts: Sequence[dict],
        eval_prompts: Sequence[dict] | None = None,
        ptx_set: Any | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.args, self.models, self.sampling, self.checkpoint = args, models, sampling, checkpoint
        self.prompts, self.output_dir = prompts, Path(args.output_dir)
        self.eval_prompts = None if eval_prompts is None else list(eval_prompts)[: args.num_eval_prompts]
        batch_size = args.per_device_prompt_batch_size * topology().data_size
        self.schedule = BatchSchedule(len(prompts), batch_size, args.data_seed, args.dataloader_drop_last)
        self.total_steps = self._count_iterations(batch_size * args.num_return_sequences)
        optimizer_steps = self.total_steps * steps_per_iteration(args)
        trained = [(models.actor, "", "actor"), (models.critic, "critic_", "critic")]
        engines = [
            self._build_engine(model, prefix, name, optimizer_steps)
            for model, prefix, name in trained[: 1 if args.critic_shares_trunk else 2]
        ]
        self.learner = Learner(args, engines[0], engines[1] if len(engines) > 1 else None, ptx_set)
        self.controller = (
            AdaptiveKLController(args.kl_coeff, args.kl_target, args.kl_horizon)
            if args.kl_controller == "adaptive"
            else FixedKLController(args.kl_coeff)
        )
        self.score_scaler = ScoreScaler(args.score_scaling, args.score_std)
        self.win_rate = WinRate(models.judge_name) if models.judge else None
        self.timer = offload.timer
        self.collector = self._build_collector(drops_copy="train_model" in offload.levels)
        for engine in reversed(engines):  # the order of use: the actor samples, then all score, the critic last
            offload.add_trained(engine)
        self.episodes, self.best = 0, BestTracker(args)
        self.checkpoints = CheckpointWriter(args, self.best, PARTS)

    def _count_iterations(self, answers: int) -> int:
        """Of the whole run; answers: of one iteration."""
        args = self.args
        if args.rollout_token_budget is not None and args.rollout_token_budget < answers:
            raise UsageError(
                f'"rollout_token_budget": {args.rollout_token_budget} is less than a token for each of an '
                f"iteration's {answers} answers"
            )
        if args.total_episodes:
            return math.ceil(args.total_episodes / answers)
        return total_steps(args, self.schedule.steps_per_epoch)

    def _build_engine(self, model: paddle.nn.Layer, prefix: str, name: str, steps: int) -> TrainingEngine:
        settings = OptimizerSettings.from_arguments(self.args, prefix)
        return TrainingEngine(model, settings, steps, name, Guard.from_arguments(self.args))

    def _build_collector(self, drops_copy: bool) -> Collector:
        args, models, learner = self.args, self.models, self.learner
        decode = partial(models.tokenizer.decode, skip_special_tokens=False)
        references = None
        if args.score_centering == "reference":
            references = ReferenceScores(models.rewards, models.tokenizer)
            references.check(self.prompts)
        return Collector(
            sampler=Sampler(
                learner.actor, args.eval_mode, args.rollout_batch_size, args.use_fusemt, decode, drops_copy
            ),
            actor=learner.actor.pipeline,
            reference=models.reference,
            critic=(learner.critic or learner.actor).pipeline,
            rewards=models.rewards,
            tokenizer=models.tokenizer,
            batch_size=args.per_device_eval_batch_size,
            timer=self.timer,
            reference_scores=references,
            judge=models.judge,
        )

    def train(self) -> dict[str, float]:
        """Run all iterations, evaluate and save on the way. Returns the last evaluation's metrics."""
        start = self._resume()
        self.models.rewards.check()
        return run_loop(
            self.args,
            start,
            self.total_steps,
            self.schedule.steps_per_epoch,
            step=self.iterate,
            evaluate=self._evaluate,
            save=self.save,
            best=self.best,
            checkpoints=self.checkpoints,
        )

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration (counted from 1) of the algorithm; returns its metrics."""
        started = time.perf_counter()
        collected = self.rollout(iteration)
        experience = collected.experience
        with in_phase("score"):
            fault = describe_bad_answers(experience, collected.components, collected.drawn_by)
            if fault is not None:
                self.learner.actor.guard.refuse(fault)
        metrics = self._learn(collected, iteration) if fault is None else self._leave_out(experience)
        self.episodes += len(experience)
        timings = self.timer.pop()
        return {
            "episode": self.episodes,
            "epoch": iteration / self.schedule.steps_per_epoch,
            **{name: float(values.mean()) for name, values in collected.components.items()},
            **metrics,
            **collected.statistics,
            **timings,
            "perf/rollout_tokens_per_s": float(experience.lengths.sum()) / timings["timing_s/rollout"],
            "perf/iteration_s": time.perf_counter() - started,
            "perf/max_memory_gb": peak_memory_gb(),
        }

    def _learn(self, collected: Collected, iteration: int) -> dict[str, float]:
        experience = collected.experience
        checked = iteration == 1 and self._is_float32()
        if checked:
            check_reference(experience, self.args.self_check_tolerance)
        targets, metrics = estimate(
            experience, self.args, self.controller, self.score_scaler, collected.reference_scores
        )
        with self.timer("update"):
            tolerance = self.args.self_check_tolerance if checked else math.inf
            return metrics | self.learner.update(experience, targets, iteration, tolerance)

    def _leave_out(self, experience: Experience) -> dict[str, float]:
        """Nothing is learnt from these answers, and neither KL controller nor score scaling sees them."""
        return describe_rollout(experience) | self.learner.leave_out(len(experience))

    def rollout(self, iteration: int) -> Collected:
        """Answers of the current policy to this iteration's prompts, judged by the other models."""
        args = self.args
        prompts = [self.prompts[int(index)] for index in self.schedule(iteration - 1)]
        drawn = math.ceil(round(args.num_return_sequences * args.rollout_oversampling, 6))  # 50 * 1.1 is 55
        budget = args.rollout_token_budget
        sampling = replace(
            self.sampling,
            keep=args.num_return_sequences if drawn > args.num_return_sequences else None,
            token_budget=budget and budget // len(prompts),
        )
        return self.collector.collect(prompts, drawn, args.seed, iteration, sampling, self._is_float32())

    def evaluate(self) -> tuple[dict[str, float], list[dict]]:
        """Metrics on the held-out prompts and, one a prompt, the rows of samples.jsonl (without their step)."""
        collected = self.collector.evaluate(self.eval_prompts, self.args.seed, EVALUATION, self.sampling)
        self.timer.pop()
        return describe_answers(collected, self.eval_prompts, self.win_rate)

    def save(self, iteration: int) -> None:
        """Write value/checkpoint-N and policy/checkpoint-N as one."""
        state = {
            "episodes": self.episodes,
            "kl_controller": self.controller.state_dict(),
            "score_scaler": self.score_scaler.state_dict(),
            "expected_lengths": self.collector.expected.state_dict(),
            "win_rate": self.win_rate and self.win_rate.state_dict(),
            FROZEN: self.models.frozen,
            DATA: fingerprints({"train_datasets": self.prompts, "ptx_datasets": self.learner.ptx_set}),
            **self.best.state_dict(),
        }
        contents, actor, critic = {}, self.learner.actor, self.learner.critic
        for engine in filter(None, (critic, actor)):
            check_state(engine)
        for part, model, engine in (("value", self.models.critic, critic), ("policy", self.models.actor, actor)):

            def collect(files: Files, model: paddle.nn.Layer = model, engine: Any = engine) -> None:
                with (engine or actor).shards.whole_model():
                    collect_model(model, self.models.tokenizer, files)

            contents[part] = content(collect, engine, iteration, state)
        self.checkpoints.save(iteration, contents)

    def _evaluate(self, iteration: int) -> dict[str, float]:
        """Evaluate, append to samples.jsonl and show some answers."""
        if self.eval_prompts is None:
            return {}
        metrics, rows = self.evaluate()
        record_samples(self.output_dir, iteration, rows)
        self.best.observe(iteration, metrics)
        return metrics

    def _resume(self) -> int:
        """The iteration to go on after; 0 for a fresh run."""
        if self.checkpoint is None:
            return 0
        if self.learner.critic is not None:
            load_training_state(critic_checkpoint(self.checkpoint), self.learner.critic)
        state = load_training_state(self.checkpoint, self.learner.actor)
        self.best.load_state_dict(state)
        self.episodes = state["episodes"]
        self.controller.load_state_dict(state["kl_controller"])
        self.score_scaler.load_state_dict(state["score_scaler"])
        if "expected_lengths" in state:  # not in checkpoints of older versions
            self.collector.expected.load_state_dict(state["expected_lengths"])
        if self.win_rate is not None:
            prompt_ids = [int(item["prompt_id"]) for item in self.eval_prompts]
            self.win_rate.load_state_dict(state.get("win_rate"), prompt_ids, self.checkpoint)
        if is_main_process():
            keep_steps(self.output_dir / SAMPLES_FILE, state["step"])
        return state["step"]

    def _is_float32(self) -> bool:
        return not self.args.bf16


def critic_checkpoint(policy: Path) -> Path:
    """The value model's checkpoint of the same iteration as ``policy``, output_dir/policy/checkpoint-N."""
    return policy.parent.parent / PARTS[1] / policy.name
