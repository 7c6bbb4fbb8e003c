"""The loop around every stage's step: record, evaluate, save, show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignment.runtime.console import progress
from alignment.runtime.metrics import MetricsWriter
from alignment.runtime.whereabouts import here, in_phase
from alignment.training.health import Health
from alignment.training.setup import is_due

Metrics = dict[str, float]


def run_loop(
    args: Any,
    start: int,
    total_steps: int,
    steps_per_epoch: int,
    step: Callable[[int], Metrics],
    evaluate: Callable[[int], Metrics],
    save: Callable[[int], Any],
) -> Metrics:
    """Call ``step`` with start + 1, ..., total_steps; evaluate and save when the arguments say so, and at the end.

    Args:
        start: steps that are done; after 0 the untrained model is evaluated first.
        evaluate: given the steps done; metrics by their full names, empty where there is nothing to evaluate on.
        save: writes the checkpoint of a step.
    Returns: what the last evaluation gave.
    """
    here.step = start
    with MetricsWriter(args, args.output_dir, resume_from=start) as writer, Health(args, start) as health:

        def record(number: int, metrics: Metrics) -> None:
            writer.write(number, metrics)
            health.observe(number, metrics)

        def record_evaluation(number: int) -> Metrics:
            with in_phase("evaluation"):
                metrics = evaluate(number)
            if metrics:
                record(number, metrics)
            return metrics

        result = record_evaluation(0) if start == 0 else {}
        with progress(total_steps, start, args) as bar:
            for number in range(start + 1, total_steps + 1):
                here.step, last = number, number == total_steps
                with in_phase("training"):
                    metrics = step(number)
                if last or number % args.logging_steps == 0:
                    record(number, metrics)
                bar.advance(metrics)
                if last or is_due(args.evaluation_strategy, args.eval_steps, number, steps_per_epoch):
                    result = record_evaluation(number)
                if last or is_due(args.save_strategy, args.save_steps, number, steps_per_epoch):
                    with in_phase("saving"):
                        save(number)
    return result
