"""What a stage's script does with its command line: a run, or a dry run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignment.dry_run.rehearsal import rehearse
from alignment.runtime.arguments import instances, resolve
from alignment.training.stage import run_stage


def run_command(
    stage: str, argv: Sequence[str], groups: Sequence[type], build: Callable[..., Any], parts: tuple[str, ...] = ("",)
) -> None:
    """Run the stage that a command line describes, or only rehearse it where it says ``dry_run``.

    Args:
        argv: the words after the script's name.
        groups: the stage's argument classes, the TrainingArguments last.
        stage, build, parts: see alignment.training.stage.run_stage.
    """
    values = resolve(argv, groups)
    if values["dry_run"]:
        rehearse(stage, values, groups, build, parts)
    else:
        run_stage(stage, instances(values, groups), build, parts)
