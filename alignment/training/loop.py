"""The loop around every stage's step: record, evaluate, save, show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignment.runtime.console import progress
from alignment.runtime.metrics import MetricsWriter
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
    with MetricsWriter(args, args.output_dir, resume_from=start) as writer:

        def record_evaluation(number: int) -> Metrics:
            metrics = evaluate(number)
            if metrics:
                writer.write(number, metrics)
            return metrics

        result = record_evaluation(0) if start == 0 else {}
        with progress(total_steps, start, args) as bar:
            for number in range(start + 1, total_steps + 1):
                metrics, last = step(number), number == total_steps
                if last or number % args.logging_steps == 0:
                    writer.write(number, metrics)
                bar.advance(metrics)
                if last or is_due(args.evaluation_strategy, args.eval_steps, number, steps_per_epoch):
                    result = record_evaluation(number)
                if last or is_due(args.save_strategy, args.save_steps, number, steps_per_epoch):
                    save(number)
    return result
