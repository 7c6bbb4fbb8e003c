"""Checkpoints: a model directory any stack loads, and beside it optimizer and run state. Nothing is pickled.

    checkpoint-N/
        model.safetensors, config.json, tokenizer files     the model, merged, in Hugging Face form
        optimizer.safetensors                                moments, merged, under the parameters' names
        trainer_state.json                                   step, schedule, controllers, moments: plain JSON
        SHA256SUMS                                           what is in all other files (alignment.training.sums)

Pipeline stages (and for the optimizer, sharding processes) each write a part, model-00001-of-00002.safetensors, beside
an index; every layout reads what any other wrote. All processes must see the same directory.

A run with several models has a checkpoint-N of each in a sub-directory of its own (a part). They are one unit, and
the first part's is renamed last: where it is, the others are.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from alignment.parallel.collectives import gather_objects
from alignment.parallel.topology import topology
from alignment.ppo.models.weights import WeightFiles, add_index, part_name
from alignment.runtime.faults import UsageError
from alignment.runtime.files import Files, sync
from alignment.runtime.metrics import is_main_process
from alignment.training.engine import TrainingEngine
from alignment.training.sums import STATE_FILE

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SKIPPED = "skipped_in_a_row"
Collect = Callable[[Files], None]


# ---- what is in one -------------------------------------------------------------------------------------------------


def content(collect_weights: Collect, engine: TrainingEngine | None, step: int, state: dict) -> Collect:
    """What adds all files of checkpoint-<step> but SHA256SUMS. Every process of the job calls it.

    Args:
        collect_weights: adds the model and its tokenizer.
        engine: its optimizer state is saved; None: another checkpoint has it.
        state: JSON-able state of the run ("step" is added).
    """

    def collect(files: Files) -> None:
        """Of this process."""
        collect_weights(files)
        values = {"step": step, **state}
        if engine is not None:
            tensors, values["schedule"] = engine.state_dict()
            values[SKIPPED] = engine.guard.in_a_row
            _add_optimizer(files, tensors)
        if is_main_process():
            files.add_text(STATE_FILE, json.dumps(values, indent=2) + "\n")

    return collect


class OptimizerFiles(WeightFiles):
    """The optimizer's tensors in a checkpoint."""

    single, index = "optimizer.safetensors", "optimizer.safetensors.index.json"


def _add_optimizer(files: Files, tensors: dict[str, np.ndarray]) -> None:
    """A part for every pipeline stage and owner; the processes that hold the same tensors leave it to the first."""
    place = topology()
    stages = gather_objects(gather_objects(list(tensors), "sharding"), "pipe")
    parts = [names for owners in stages for names in owners]
    if place.tensor_rank == 0 and place.data_rank < place.layout.sharding:
        number = place.stage * place.layout.sharding + place.sharding_rank
        files.add_tensors(part_name(OptimizerFiles.single, number, len(parts)), tensors)
    if is_main_process():
        add_index(files, OptimizerFiles.index, OptimizerFiles.single, parts)


def read_state(checkpoint: Path) -> dict:
    """The whole trainer_state.json. Raises UsageError if it is missing or damaged."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        if not isinstance(state, dict):
            raise ValueError("no object with a schedule")
    except (OSError, ValueError) as error:
        raise UsageError(f"{checkpoint}: cannot resume from it: {STATE_FILE}: {error}") from error
    return state


def load_training_state(checkpoint: Path, engine: TrainingEngine) -> dict:
    """Put the optimizer, schedule and skipped steps of ``checkpoint`` into ``engine``; returns the run's state.

    Raises: UsageError if a file is missing or damaged, or of a model with other trained parameters.
    """
    state = read_state(checkpoint)
    try:
        engine.load_state_dict(OptimizerFiles(checkpoint), state.get("schedule"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{checkpoint}: cannot resume from it: {error}") from error
    engine.guard.in_a_row = state.get(SKIPPED, 0)  # not in checkpoints of older versions
    return state


# ---- where they are -------------------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int:
    """N of a directory checkpoint-N."""
    return int(CHECKPOINT.fullmatch(checkpoint.name).group(1))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The directories checkpoint-N of ``output_dir``, oldest first, sound or not."""
    found = Path(output_dir).glob("checkpoint-*")  # a person may have put a "checkpoint-best" beside ours
    return sorted((path for path in found if CHECKPOINT.fullmatch(path.name) and path.is_dir()), key=step_of)


def partial_of(directory: Path) -> Path:
    """Where a checkpoint is while it is written, and while it is removed."""
    return directory.with_name(f".{directory.name}.partial")


def _replaced_of(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")


def commit(directories: Sequence[Path]) -> None:
    """Put complete partial directories in their places; the first one's rename, done last, makes it a checkpoint.

    What is there already stays beside until then, and ``recover`` puts it back if this was not finished.
    """
    for directory in reversed(directories):
        if directory.exists():
            os.replace(directory, _replaced_of(directory))
        os.replace(partial_of(directory), directory)
        sync(directory.parent)
    for directory in directories:
        shutil.rmtree(_replaced_of(directory), ignore_errors=True)


def recover(output_dir: Path, parts: Sequence[str]) -> None:
    """Take back a replacement that a killed run had not finished, or finish one that was."""
    for part in parts:
        for replaced in sorted((output_dir / part).glob(".checkpoint-*.replaced")):
            name = replaced.name[1:].removesuffix(".replaced")
            directory = output_dir / part / name
            if partial_of(output_dir / parts[0] / name).exists() or not directory.exists():
                shutil.rmtree(directory, ignore_errors=True)
                os.replace(replaced, directory)
            else:
                shutil.rmtree(replaced)


def leftovers(output_dir: Path, parts: Sequence[str]) -> list[Path]:
    """What a killed run left half-written or half-removed, and checkpoints that lack their first part's."""
    found = [path for part in parts for path in sorted((output_dir / part).glob(".checkpoint-*.partial"))]
    whole = {path.name for path in list_checkpoints(output_dir / parts[0])}
    others = [path for part in parts[1:] for path in list_checkpoints(output_dir / part)]
    return found + [path for path in others if path.name not in whole]


def drop_old_checkpoints(
    output_dir: Path, save_total_limit: int | None, parts: Sequence[str] = ("",), keep: Collection[int] = ()
) -> None:
    """Keep the newest ``save_total_limit`` checkpoints (all, if it is None or not positive), and of steps ``keep``.

    The first part's goes first: without it the others are nobody's.
    """
    if save_total_limit and save_total_limit > 0:
        for old in list_checkpoints(Path(output_dir) / parts[0])[:-save_total_limit]:
            if step_of(old) not in keep:
                for part in parts:
                    remove_checkpoint(Path(output_dir) / part / old.name)


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint, if it is there; killed meanwhile, it leaves nothing that looks like one."""
    if directory.exists():
        shutil.rmtree(partial_of(directory), ignore_errors=True)
        os.replace(directory, partial_of(directory))
        shutil.rmtree(partial_of(directory))


def find_checkpoint(resume_from_checkpoint: str | None, part: str = "") -> Path | None:
    """The checkpoint that alignment.training.resume.choose_start has chosen, or None.

    Args:
        part: sub-directory that holds the checkpoints of one model of several ("policy", "value"); the path then
            names the checkpoint of any of them, e.g. output_dir/policy/checkpoint-3.
    """
    if resume_from_checkpoint is None:
        return None
    path = Path(resume_from_checkpoint)
    return path.parent.parent / part / path.name if part else path
