"""One stage from checked arguments to its last line on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle

from alignment.parallel.collectives import barrier
from alignment.runtime.console import say, show_summary
from alignment.runtime.run_record import write_run_record
from alignment.runtime.termination import stoppable
from alignment.training.resume import agree_on_start, is_finished
from alignment.training.setup import check_output, clear_output, mixed_precision, take_output

_TOO_EARLY = "SIGTERM, before there was anything to save; run the same command again"


def run_stage(
    stage: str, arguments: Sequence[Any], build: Callable[..., Any], parts: tuple[str, ...] = ("",)
) -> dict[str, float]:
    """Build a stage's trainer and run it; returns what its ``train`` returned.

    Args:
        stage: "sft", "rm", "ppo", "offline" or "update".
        arguments: what alignment.runtime.arguments.parse gave; the last are the TrainingArguments.
        build: makes the trainer of them; everything that can be wrong with the input shows here.
        parts: see alignment.training.setup.check_output.
    """
    with stoppable(_TOO_EARLY), take_output(arguments[-1]):
        return _run(stage, arguments, build, parts)


def _run(stage: str, arguments: Sequence[Any], build: Callable[..., Any], parts: tuple[str, ...]) -> dict[str, float]:
    args = arguments[-1]
    if args.layout.processes > 1:
        say(f"layout: {args.layout}")
    start = agree_on_start(args, parts)
    args.resume_from_checkpoint = None if start.checkpoint is None else str(start.checkpoint)
    check_output(args, start, parts)
    paddle.seed(args.seed)
    trainer = build(*arguments)
    barrier()  # loading may have taken one process much longer than another
    if is_finished(args, start, trainer.total_steps):
        say(f"{stage}: the run in {args.output_dir} is finished, its last checkpoint is {start.checkpoint.name}")
        return {}
    clear_output(args, start, parts)
    write_run_record(args.output_dir, stage, arguments)
    with mixed_precision(args):
        result = trainer.train()
    show_summary(f"{stage} finished: {args.output_dir}", {"steps": trainer.total_steps, **result})
    barrier()  # a process that leaves first would make the others report a lost connection
    return result
