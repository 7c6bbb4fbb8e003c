"""A dry run from checked arguments to its verdict."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.dry_run.datasets import few_rows
from alignment.dry_run.memory import plan_run
from alignment.dry_run.models import find_models, write_small_models
from alignment.dry_run.scale import scale_down, without_parallelism
from alignment.parallel.collectives import barrier, gather_objects
from alignment.parallel.layout import Layout, resolve_layout
from alignment.parallel.plan import Plan
from alignment.parallel.plan.tables import describe
from alignment.parallel.topology import join
from alignment.runtime.arguments import instances
from alignment.runtime.bootstrap import configure_paddle
from alignment.runtime.console import say, show_summary
from alignment.runtime.faults import UsageError, process_count
from alignment.runtime.metrics import is_main_process
from alignment.training.argument_checks import planned_processes
from alignment.training.resume import choose_start
from alignment.training.stage import run_stage


def rehearse(
    stage: str,
    values: Mapping[str, Any],
    groups: Sequence[type],
    build: Callable[..., Any],
    parts: tuple[str, ...] = ("",),
) -> None:
    """Plan the run's memory, then run one step of it with small random models; leaves nothing behind.

    Args:
        values: all arguments by name, as alignment.runtime.arguments.resolve gives them.
        stage, groups, build, parts: see alignment.training.command.run_command.
    Raises: UsageError, DataError and RunError as the run itself would.
    """
    started = time.perf_counter()
    device = configure_paddle(values["device"], debug=values["log_level"] == "debug")
    if is_main_process():
        choose_start(values["output_dir"], values["resume_from_checkpoint"], parts)
    originals, missing = find_models(values)
    made = plan_run(stage, values, originals)
    data, replaced = few_rows(values)
    possible, changed = _as_possible_here(values, device)
    for line in (*_tell(made, values), *missing, *replaced, *changed):
        say(line)
    layout = resolve_layout(possible, process_count())
    small = scale_down(possible, layout, own_tokenizer=originals[0].is_here) | data
    with _shared_directory(layout, values["seed"]) as directory:
        models = write_small_models(originals, directory / "models")
        small |= {key: models[value] for key, value in values.items() if key.endswith("model_name_or_path") and value}
        small |= {"output_dir": str(directory / "output"), "logging_dir": None, "report_to": []}
        with contextlib.redirect_stdout(io.StringIO()), _named_as_given(models):  # its answers mean nothing
            run_stage(stage, instances(small, groups), build, parts)
    _show(stage, made, layout, small, time.perf_counter() - started)


def _tell(made: Plan | str, values: Mapping[str, Any]) -> list[str]:
    if isinstance(made, str):
        return [made]
    bound = ["lora: planned as training of all weights, which is an upper bound"] if values["lora"] else []
    return [describe(made), made.verdict(), *bound]


def _as_possible_here(values: Mapping[str, Any], device: str) -> tuple[dict[str, Any], list[str]]:
    """The arguments without what the started processes and their device cannot do, and a line for each change."""
    possible, notes = dict(values), []
    if planned_processes(values) > process_count():
        notes.append(f"one process was started, the run asks for {planned_processes(values)}: no parallelism here")
        possible = without_parallelism(possible)
    if values["bf16"] and device == "cpu":
        notes.append("bf16: this device is a CPU; the dry run computes in float32")
        possible["bf16"] = False
    return possible, notes


@contextlib.contextmanager
def _shared_directory(layout: Layout, seed: int) -> Iterator[Path]:
    """A temporary directory of all processes, which meet for it; rank 0 makes and removes it.

    Raises: UsageError if a process does not see it.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # Paddle's banner of flags
        join(layout, seed)
    made = tempfile.mkdtemp(prefix="alignment-dry-run-") if is_main_process() else ""
    directory = Path(gather_objects(made, "world")[0])
    try:
        if not all(gather_objects(directory.is_dir(), "world")):
            raise UsageError(f"dry run: {directory} is not on every host; set TMPDIR to a directory that all see")
        yield directory
        barrier()
    finally:
        if is_main_process():
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _named_as_given(models: Mapping[str, str]) -> Iterator[None]:
    """A UsageError names the run's models, not the small ones in their places."""
    try:
        yield
    except UsageError as fault:
        message = str(fault)
        for name, directory in models.items():
            message = message.replace(directory, name)
        raise UsageError(message) from fault


def _show(stage: str, made: Plan | str, layout: Layout, small: Mapping[str, Any], seconds: float) -> None:
    fits = ("fits" if made.fits else "does not fit") if isinstance(made, Plan) else "not planned"
    rows = {
        "plan": fits,
        "layout": str(layout),
        "precision": "bfloat16" if small["bf16"] else "float32",
        "seconds": seconds,
    }
    show_summary(f"{stage}: one step of a small model", rows)
    say("dry run: passed")
