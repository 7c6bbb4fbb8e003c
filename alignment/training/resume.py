"""Where a run starts: afresh, or from a checkpoint that is proved to be as it was written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.parallel.collectives import gather_objects
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError
from alignment.runtime.metrics import is_main_process
from alignment.training.best import BestTracker
from alignment.training.checkpoint import (
    CHECKPOINT,
    find_checkpoint,
    leftovers,
    list_checkpoints,
    read_state,
    recover,
    step_of,
)
from alignment.training.sums import find_damage

AUTO, NEWEST = "auto", "true"


@dataclass(frozen=True)
class Start:
    """What a run goes on from.

    checkpoint: of the first part, or None to start afresh; passed_over: damaged ones that are newer, with what is
    wrong with them; automatic: whether the arguments leave the choice to what is there.
    """

    checkpoint: Path | None = None
    passed_over: Mapping[Path, str] = field(default_factory=dict)
    automatic: bool = False

    def is_inside(self, output_dir: str | Path) -> bool:
        """Whether the run goes on in the directory that it was in."""
        return self.checkpoint is not None and self.checkpoint.resolve().is_relative_to(Path(output_dir).resolve())


def choose_start(output_dir: str | Path, resume_from_checkpoint: str | None, parts: Sequence[str] = ("",)) -> Start:
    """What resume_from_checkpoint asks for: null, "true", "auto" or a path. It only looks.

    Args: parts: sub-directories of output_dir that hold checkpoints, the one that commits first; or "" for itself.
    Raises: UsageError, naming the file and what is wrong with it, if what was asked for is not there or not sound.
    """
    asked = resume_from_checkpoint
    if asked in (None, "", "false", "False"):
        return Start()
    if asked.lower() not in (AUTO, NEWEST):
        return Start(_named(asked, parts[0]))
    passed_over: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(Path(output_dir) / parts[0])):
        damage = find_damage(checkpoint)
        if damage is None:
            return Start(checkpoint, passed_over, asked == AUTO)
        if asked != AUTO:
            raise _refuse(f'{damage}; "auto" goes on from the newest sound checkpoint')
        passed_over[checkpoint] = damage
    if asked != AUTO:
        raise _refuse(f"no checkpoint in {Path(output_dir) / parts[0]}")
    return Start(None, passed_over, True)


def agree_on_start(args: Any, parts: Sequence[str]) -> Start:
    """``choose_start`` of a stage's arguments: the main process looks, all get what it found."""
    own = None
    if is_main_process():
        recover(Path(args.output_dir), parts)
        own = choose_start(args.output_dir, args.resume_from_checkpoint, parts)
    start: Start = gather_objects(own, "world")[0]
    for damage in start.passed_over.values():
        say(f"notice: {damage}; this checkpoint is passed over")
    if start.automatic:
        say(f"going on from {start.checkpoint}" if start.checkpoint else "no checkpoint to go on from: a fresh start")
    return start


def is_finished(args: Any, start: Start, total_steps: int) -> bool:
    """Whether there is nothing left to do in output_dir."""
    if not start.is_inside(args.output_dir):
        return False
    best = BestTracker(args)
    best.load_state_dict(read_state(start.checkpoint))
    return step_of(start.checkpoint) >= total_steps or best.is_exhausted


def clear_leftovers(output_dir: str | Path, start: Start, parts: Sequence[str]) -> None:
    """Remove what killed runs left, and set damaged checkpoints aside, as checkpoint-N.damaged."""
    recover(Path(output_dir), parts)
    for path in leftovers(Path(output_dir), parts):
        shutil.rmtree(path)
    for checkpoint in start.passed_over:
        for part in parts:
            damaged = Path(output_dir) / part / checkpoint.name
            if damaged.exists():
                aside = damaged.with_name(f"{damaged.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(damaged, aside)


def _named(asked: str, part: str) -> Path:
    path = find_checkpoint(asked, part)
    if not CHECKPOINT.fullmatch(path.name) or not path.is_dir():
        form = Path(part) / "checkpoint-N"
        raise _refuse(f'{asked} is not a checkpoint; it must be a path to a directory {form}, "true" or "auto"')
    damage = find_damage(path)
    if damage is not None:
        raise _refuse(damage)
    return path


def _refuse(problem: str) -> UsageError:
    return UsageError(f'"resume_from_checkpoint": {problem}')
