"""The loop around every stage's step: record, evaluate, save, show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import paddle

from alignment.parallel.collectives import sum_tensors
from alignment.parallel.topology import topology
from alignment.runtime.console import progress
from alignment.runtime.metrics import MetricsWriter
from alignment.runtime.termination import Stopped, is_stopping, postponed
from alignment.runtime.timing import PhaseTimer
from alignment.runtime.whereabouts import here, in_phase
from alignment.training.best import BestTracker
from alignment.training.health import Health
from alignment.training.setup import is_due
from alignment.training.writer import CheckpointWriter

Metrics = dict[str, float]


def run_loop(
    args: Any,
    start: int,
    total_steps: int,
    steps_per_epoch: int,
    step: Callable[[int], Metrics],
    evaluate: Callable[[int], Metrics],
    save: Callable[[int], Any],
    best: BestTracker,
    checkpoints: CheckpointWriter,
) -> Metrics:
    """Call ``step`` with start + 1, ..., total_steps; evaluate and save when the arguments say so, and at the end.

    A new best evaluation is saved at once; early_stopping_patience may end the loop sooner. Rows also have what
    evaluation and saving took since the row before.

    Args:
        start: steps that are done; after 0 the untrained model is evaluated first.
        evaluate: given the steps done; metrics by their full names, empty where there is nothing to evaluate on.
            It tells them to ``best``.
        save: writes the checkpoint of a step, by ``checkpoints``.
    Returns: what the last evaluation gave.
    Raises: Stopped after SIGTERM, when the step that was going on is saved.
    """
    here.step, timer = start, PhaseTimer()
    with (
        MetricsWriter(args, args.output_dir, resume_from=start) as writer,
        Health(args, start) as health,
        postponed(),
        in_phase("between steps"),  # but for the phases below
    ):
        record = _Recorder(writer, health, timer, evaluate)
        result = record.evaluation(0) if start == 0 else {}
        with progress(total_steps, start, args) as bar:
            for number in range(start + 1, total_steps + 1):
                here.step, last = number, number == total_steps
                with in_phase("training"):
                    metrics = step(number)
                checkpoints.check()
                if last or number % args.logging_steps == 0:
                    record.row(number, metrics)
                bar.advance(metrics)
                if last or is_due(args.evaluation_strategy, args.eval_steps, number, steps_per_epoch):
                    result = record.evaluation(number)
                last = last or best.is_exhausted
                stops = not last and _any_is_stopping()
                due = is_due(args.save_strategy, args.save_steps, number, steps_per_epoch)
                if last or stops or due or best.best_step == number:
                    with timer("saving"):
                        save(number)
                if last or stops:
                    checkpoints.finish()
                if stops:
                    raise _stopped(number, total_steps)
                if last:
                    break
    return result


class _Recorder(NamedTuple):
    """Where rows go, with what ``timer`` has measured since the row before."""

    writer: MetricsWriter
    health: Health
    timer: PhaseTimer
    evaluate: Callable[[int], Metrics]

    def row(self, number: int, metrics: Metrics) -> None:
        """The row of step ``number``."""
        self.writer.write(number, metrics | self.timer.pop())
        self.health.observe(number, metrics)

    def evaluation(self, number: int) -> Metrics:
        """Evaluate after step ``number``; no row where there is nothing to evaluate on."""
        with self.timer("evaluation"):
            metrics = self.evaluate(number)
        if metrics:
            self.row(number, metrics)
        else:
            self.timer.pop()
        return metrics


def _stopped(number: int, total_steps: int) -> Stopped:
    return Stopped(
        f"SIGTERM in step {number} of {total_steps}, which is done and saved; to go on, run the same command with "
        "--resume_from_checkpoint auto"
    )


def _any_is_stopping() -> bool:
    """Whether SIGTERM has come to a process of the job; all of them get the same answer."""
    if topology().group("world") is None:
        return is_stopping()
    told = paddle.to_tensor([float(is_stopping())])
    sum_tensors([told], "world")
    return bool(float(told) > 0)
