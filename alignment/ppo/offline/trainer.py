"""Learning from logged answers: prepare -> step -> evaluate -> save, whatever the objective."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from alignment.ppo.collect import Collector
from alignment.ppo.evaluation import EVALUATION, describe_answers, record_samples
from alignment.ppo.frozen import FROZEN, Prints
from alignment.ppo.judge import WinRate
from alignment.ppo.models.saving import collect_model
from alignment.ppo.offline.logged import LoggedAnswers
from alignment.ppo.rollout.protocol import AdjustLogits, SamplingParameters
from alignment.runtime.console import say
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process, keep_steps
from alignment.runtime.timing import peak_memory_gb
from alignment.training.batches import BatchSchedule
from alignment.training.best import BestTracker
from alignment.training.checkpoint import content, load_training_state
from alignment.training.engine import TrainingEngine
from alignment.training.loop import run_loop
from alignment.training.nonfinite import check_state
from alignment.training.same_data import DATA, fingerprints
from alignment.training.setup import SAMPLES_FILE, total_steps
from alignment.training.writer import CheckpointWriter

PARTS = ("policy", "value")


class OfflineLearner(Protocol):
    """What learns from logged answers.

    engines: by the sub-directory of output_dir that gets the model's checkpoints; "policy" is the last.
    collector: answers held-out prompts by what was learnt, and has the reward sources score them.
    schedule: which answers a step takes. critic_steps: steps before the first of the policy.
    decodings: the policies that answer held-out prompts, by what is put into their metrics' names ("" for the first).
    train: what it learns from.
    """

    engines: dict[str, TrainingEngine]
    collector: Collector
    schedule: BatchSchedule
    critic_steps: int
    train: LoggedAnswers
    decodings: dict[str, AdjustLogits | None]

    def prepare(self, checkpoint: Path | None = None) -> None:
        """Called once before the first step, after ``load_state_dict`` where ``checkpoint`` is resumed."""

    def step(self, number: int) -> dict[str, float]:
        """Step ``number``, counted from 1; returns its metrics."""

    def evaluate(self, number: int) -> dict[str, float]:
        """Metrics on held-out answers after ``number`` steps; empty where there are none."""

    def state_dict(self) -> dict:
        """What trainer_state.json holds; plain JSON."""

    def load_state_dict(self, state: dict) -> None:
        """Takes back what ``state_dict`` gave."""

    def save_measured(self, files: Files) -> None:
        """Add what else a resumed run needs to the policy's checkpoint; every process calls it."""


class OfflineTrainer:
    """Runs an OfflineLearner.

    Args:
        args: alignment.ppo.offline.arguments.TrainingArguments.
        tokenizer: saved beside each model.
        learner: see OfflineLearner.
        eval_prompts: items of a PromptOnlyDataset that the policy answers when it is evaluated, or None.
        sampling: how it answers them.
        win_rate: measures what a judge says of them, or None.
        checkpoint: ``policy/checkpoint-N`` to resume from, or None.
        frozen: what tells the frozen models from others, for a resumed run.
    """

    def __init__(
        self,
        args: Any,
        tokenizer: Any,
        learner: OfflineLearner,
        eval_prompts: Sequence[dict] | None,
        sampling: SamplingParameters,
        win_rate: WinRate | None = None,
        checkpoint: Path | None = None,
        frozen: Prints | None = None,
    ) -> None:
        self.args, self.tokenizer, self.learner, self.checkpoint = args, tokenizer, learner, checkpoint
        self.eval_prompts, self.sampling, self.win_rate = eval_prompts, sampling, win_rate
        self.frozen = frozen or {}
        self.output_dir, self.timer = Path(args.output_dir), learner.collector.timer
        self.steps_per_epoch = learner.schedule.steps_per_epoch
        self.total_steps = learner.critic_steps + total_steps(args, self.steps_per_epoch)
        self.best = BestTracker(args, first=learner.critic_steps + 1)
        self.checkpoints = CheckpointWriter(args, self.best, [part for part in PARTS if part in learner.engines])

    def train(self) -> dict[str, float]:
        """Run all steps, evaluate and save on the way. Returns the last evaluation's metrics."""
        if self.learner.collector.rewards is not None:
            self.learner.collector.rewards.check()
        start = self._resume()
        say("measuring the logged answers")  # minutes, for many of them
        with self.timer("score"):
            self.learner.prepare(self.checkpoint)
        return run_loop(
            self.args,
            start,
            self.total_steps,
            self.steps_per_epoch,
            step=self.training_step,
            evaluate=self.evaluate,
            save=self.save,
            best=self.best,
            checkpoints=self.checkpoints,
        )

    def training_step(self, number: int) -> dict[str, float]:
        """One optimizer step, counted from 1, of each model that learns in it."""
        started = time.perf_counter()
        with self.timer("update"):
            metrics = self.learner.step(number)
        return {
            "epoch": number / self.steps_per_epoch,
            **metrics,
            **self.timer.pop(),
            "perf/iteration_s": time.perf_counter() - started,
            "perf/max_memory_gb": peak_memory_gb(),
        }

    def evaluate(self, number: int) -> dict[str, float]:
        """Metrics on held-out answers and, where the policy may be another than last time, of its own answers."""
        metrics = self.learner.evaluate(number)
        if self.eval_prompts is not None and (number == 0 or number > self.learner.critic_steps):
            plain = {} if number else {"": None}  # the initial policy as it is: what the judge compares with
            for name, adjust in (self.learner.decodings | plain).items():
                metrics |= self._answer_prompts(number, name, adjust)
        self.timer.pop()
        self.best.observe(number, metrics)
        return metrics

    def _answer_prompts(self, number: int, decoding: str, adjust: AdjustLogits | None) -> dict[str, float]:
        """Metrics, and rows of samples.jsonl, of the answers of one of ``learner.decodings``."""
        collector = self.learner.collector
        collector.sampler.engine.adjust_logits = adjust
        collected = collector.evaluate(self.eval_prompts, self.args.seed, EVALUATION, self.sampling)
        metrics, rows = describe_answers(collected, self.eval_prompts, self.win_rate)
        if decoding:
            metrics = {name.replace("eval/", f"eval/{decoding}/", 1): value for name, value in metrics.items()}
            rows = [{**row, "decoding": decoding} for row in rows]
        record_samples(self.output_dir, number, rows)
        return metrics

    def save(self, number: int) -> None:
        """Write a checkpoint-N of every model as one."""
        for engine in self.learner.engines.values():
            check_state(engine)
        state = self.learner.state_dict() | {"win_rate": self.win_rate and self.win_rate.state_dict()}
        data = fingerprints({"train_datasets": self.learner.train.dataset})
        state, contents = state | {FROZEN: self.frozen, DATA: data} | self.best.state_dict(), {}
        for part, engine in self.learner.engines.items():

            def collect(files: Files, part: str = part, engine: TrainingEngine = engine) -> None:
                with engine.shards.whole_model():
                    collect_model(engine.model, self.tokenizer, files)
                    if part == "policy":
                        self.learner.save_measured(files)

            contents[part] = content(collect, engine, number, state)
        self.checkpoints.save(number, contents)

    def _resume(self) -> int:
        """The step to go on after; 0 for a fresh run."""
        if self.checkpoint is None:
            return 0
        for part, engine in self.learner.engines.items():
            state = load_training_state(self.checkpoint.parent.parent / part / self.checkpoint.name, engine)
        self.learner.load_state_dict(state)
        self.best.load_state_dict(state)
        if self.win_rate is not None:
            prompt_ids = [int(item["prompt_id"]) for item in self.eval_prompts]
            self.win_rate.load_state_dict(state.get("win_rate"), prompt_ids, self.checkpoint)
        if is_main_process():
            keep_steps(self.output_dir / SAMPLES_FILE, state["step"])
        return state["step"]
