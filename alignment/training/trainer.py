"""The loop of the supervised stages (SFT and reward modelling): one model, labelled samples, one loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from alignment.parallel.collectives import gather_objects
from alignment.parallel.pipeline import MicroBatch
from alignment.parallel.topology import topology
from alignment.ppo.models.saving import collect_model
from alignment.runtime.files import Files
from alignment.runtime.timing import PhaseTimer, peak_memory_gb
from alignment.training.batches import BatchSchedule, idle_rounds, own_micro_batches
from alignment.training.best import BestTracker
from alignment.training.checkpoint import content, load_training_state
from alignment.training.engine import OptimizerSettings, TrainingEngine
from alignment.training.loop import run_loop
from alignment.training.nonfinite import Guard, check_state
from alignment.training.same_data import DATA, fingerprints
from alignment.training.setup import check_positions, total_steps
from alignment.training.writer import CheckpointWriter

Arrays = dict[str, np.ndarray]


class StageTrainer(ABC):
    """Trains one model on labelled samples; a subclass says what a sample costs.

    Args:
        args: the stage's arguments (alignment.training.arguments.StageArguments).
        model, tokenizer: what is trained, and what is saved beside it.
        train_set, eval_set: data sets of one kind; eval_set may be None.
        checkpoint: directory to resume from, or None.
    """

    def __init__(
        self,
        args: Any,
        model: paddle.nn.Layer,
        tokenizer: Any,
        train_set: Sequence[dict],
        eval_set: Sequence[dict] | None,
        checkpoint: Path | None = None,
    ) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.train_set, self.eval_set, self.checkpoint = train_set, eval_set, checkpoint
        self.collate: Callable[[list[dict]], Arrays] = train_set.get_collator()
        longest = max(self.length(item) for part in (train_set, eval_set or ()) for item in part)
        check_positions("max_length", model, longest)
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * topology().data_size
        self.schedule = BatchSchedule(len(train_set), batch_size, args.data_seed, args.dataloader_drop_last)
        self.total_steps = total_steps(args, self.schedule.steps_per_epoch)
        settings, guard = OptimizerSettings.from_arguments(args), Guard.from_arguments(args)
        self.engine = TrainingEngine(model, settings, self.total_steps, "model", guard)
        self.output_dir, self.best, self.timer = Path(args.output_dir), BestTracker(args), PhaseTimer()
        self.checkpoints = CheckpointWriter(args, self.best)

    # ---- what a subclass provides -----------------------------------------------------------------------------------

    @abstractmethod
    def length(self, item: dict) -> int:
        """Tokens of one sample, to batch like with like."""

    @abstractmethod
    def count(self, items: Iterable[dict]) -> Any:
        """What these samples make the loss's denominator: their label tokens, or pairs."""

    @abstractmethod
    def micro_batch(self, batch: Arrays, denominator: Any) -> MicroBatch:
        """A collated batch ready to run: its loss, divided by the global ``denominator`` (of ``count``), and as report
        the loss's value and rows for ``describe``, which those of all micro-batches are joined to."""

    @abstractmethod
    def describe(self, loss: float, rows: Arrays) -> dict[str, float]:
        """Metrics of a global batch, or of the held-out samples, from its loss and the rows of all ranks."""

    def finish_step(self, rows: Arrays) -> None:  # noqa: B027
        """Called with the rows of all ranks after each optimizer step."""

    def state_dict(self) -> dict:
        """What a checkpoint holds beside weights and optimizer; plain JSON."""
        return {}

    def load_state_dict(self, state: dict) -> None:  # noqa: B027
        """Takes back what ``state_dict`` gave (the whole trainer_state.json)."""

    def data_sets(self) -> dict[str, Any]:
        """Those that a resumed run must have unchanged, by their arguments; None: there is none."""
        return {"train_datasets": self.train_set}

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run all steps, evaluate and save on the way. Returns the last evaluation's metrics."""
        return run_loop(
            self.args,
            self._resume(),
            self.total_steps,
            self.schedule.steps_per_epoch,
            step=self.training_step,
            evaluate=self._evaluate,
            save=self.save,
            best=self.best,
            checkpoints=self.checkpoints,
        )

    def training_step(self, step: int) -> dict[str, float]:
        """One optimizer step on global batch number ``step``, counted from 1."""
        indices = self.schedule(step - 1).tolist()
        with self.timer("training"):
            items = [self.train_set[index] for index in indices]
            metrics = self._learn(items, indices)
        timings = self.timer.pop()
        seconds = timings["timing_s/training"]
        return metrics | {
            "epoch": step / self.schedule.steps_per_epoch,
            **timings,
            "perf/iteration_s": seconds,
            "perf/tokens_per_s": sum(_count_tokens(item) for item in items) / seconds,
            "perf/max_memory_gb": peak_memory_gb(),
        }

    def _learn(self, items: list[dict], indices: Sequence[int]) -> dict[str, float]:
        """One optimizer step on these samples, which ``indices`` name in the data set; its metrics."""
        size = self.args.per_device_train_batch_size
        reports = self.engine.accumulate(self._micro_batches(items, size, indices), idle_rounds(len(items), size))
        loss, rows = _over_processes(reports)
        metrics = {"loss": loss, **self.engine.step(loss)}
        if not metrics.get("skipped_steps"):
            metrics |= self.describe(loss, rows)
            self.finish_step(rows)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Metrics on all held-out samples."""
        return self.describe(*self.run_held_out())

    def run_held_out(self) -> tuple[float, Arrays]:
        """Loss and rows of all held-out samples, every process working on its share."""
        items, size = list(self.eval_set), self.args.per_device_eval_batch_size
        reports = self.engine.pipeline.forward(self._micro_batches(items, size, range(len(items))))
        return _over_processes(reports)

    def _micro_batches(self, items: list[dict], size: int, indices: Sequence[int]) -> list[MicroBatch]:
        """This process's share of the items; indices: theirs in the data set."""
        denominator, result = self.count(items), []
        for part in own_micro_batches(range(len(items)), lambda place: self.length(items[place]), size):
            batch = self.collate([items[place] for place in part])
            samples = [indices[place] for place in part]
            result.append(self.micro_batch(batch, denominator)._replace(samples=samples))
        return result

    def save(self, step: int) -> None:
        """Write checkpoint-<step> and drop the oldest over save_total_limit."""
        check_state(self.engine)
        state = self.state_dict() | self.best.state_dict() | {DATA: fingerprints(self.data_sets())}
        self.checkpoints.save(step, {"": content(self.collect_files, self.engine, step, state)})

    def collect_files(self, files: Files) -> None:
        """Add what a checkpoint has beside the run's state; every process calls it."""
        with self.engine.shards.whole_model():
            collect_model(self.model, self.tokenizer, files)

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.eval_set is None:
            return {}
        metrics = {f"eval/{name}": value for name, value in self.evaluate().items()}
        self.best.observe(step, metrics)
        return metrics

    def _resume(self) -> int:
        """The step to go on after; 0 for a fresh run."""
        if self.checkpoint is None:
            return 0
        state = load_training_state(self.checkpoint, self.engine)
        self.load_state_dict(state)
        self.best.load_state_dict(state)
        return state["step"]


def _count_tokens(item: dict) -> int:
    return sum(np.hstack(ids).size for name, ids in item.items() if name.endswith("input_ids"))


def _over_processes(reports: list[tuple[float, Arrays]]) -> tuple[float, Arrays]:
    """The sum of the losses and the rows of all processes' samples; all reports have the same keys."""
    everything = [report for own in gather_objects(reports) for report in own]
    names = everything[0][1]
    return sum(loss for loss, _ in everything), {
        name: np.concatenate([rows[name] for _, rows in everything]) for name in names
    }
