"""Checkpoints: a model directory any stack loads, and beside it optimizer and run state. Nothing is pickled.

    checkpoint-N/
        model.safetensors, config.json, tokenizer files     the model, merged, in Hugging Face form
        optimizer.safetensors                                moments, merged, under the parameters' names
        trainer_state.json                                   step, schedule, controllers, moments: plain JSON

Pipeline stages (and for the optimizer, sharding processes) each write a part, model-00001-of-00002.safetensors, beside
an index; every layout reads what any other wrote. All processes must see the same directory.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from alignment.parallel.collectives import barrier, gather_objects
from alignment.parallel.topology import topology
from alignment.ppo.models.weights import WeightFiles, part_name, write_index
from alignment.runtime.faults import UsageError
from alignment.runtime.metrics import is_main_process
from alignment.training.engine import TrainingEngine

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Fill ``directory`` by ``write`` as one act: a crash leaves either all of it or nothing.

    Every process calls ``write``, which decides who writes what.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    write(partial)
    barrier()
    if is_main_process():
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    barrier()


def save_checkpoint(
    output_dir: Path, step: int, save_weights: Callable[[Path], None], engine: TrainingEngine | None, state: dict
) -> Path:
    """Write ``output_dir/checkpoint-<step>``.

    Args:
        save_weights: writes the model and its tokenizer into a directory.
        engine: its optimizer state is saved; None: another checkpoint has it.
        state: JSON-able state of the run ("step" is added).
    """

    def write(directory: Path) -> None:
        save_weights(directory)
        content = {"step": step, **state}
        if engine is not None:
            tensors, content["schedule"] = engine.state_dict()
            _write_optimizer(directory, tensors)
        if is_main_process():
            (directory / "trainer_state.json").write_text(json.dumps(content, indent=2) + "\n")

    directory = Path(output_dir) / f"checkpoint-{step}"
    write_directory(directory, write)
    return directory


class OptimizerFiles(WeightFiles):
    """The optimizer's tensors in a checkpoint."""

    single, index = "optimizer.safetensors", "optimizer.safetensors.index.json"


def _write_optimizer(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    """A part for every pipeline stage and owner; the processes that hold the same tensors leave it to the first."""
    place = topology()
    stages = gather_objects(gather_objects(list(tensors), "sharding"), "pipe")
    parts = [names for owners in stages for names in owners]
    if place.tensor_rank == 0 and place.data_rank < place.layout.sharding:
        number = place.stage * place.layout.sharding + place.sharding_rank
        path = directory / part_name(OptimizerFiles.single, number, len(parts))
        save_file(tensors, str(path))
        path.chmod(0o644)  # safetensors creates 0600
    if is_main_process():
        write_index(directory / OptimizerFiles.index, OptimizerFiles.single, parts)


def load_training_state(checkpoint: Path, engine: TrainingEngine) -> dict:
    """Put the optimizer and schedule of ``checkpoint`` into ``engine``; returns the run's state.

    Raises: UsageError if a file is missing or damaged, or of a model with other trained parameters.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        schedule = state.get("schedule") if isinstance(state, dict) else None
        engine.load_state_dict(OptimizerFiles(checkpoint), schedule)
    except (OSError, ValueError) as error:
        raise UsageError(f"{checkpoint}: cannot resume from it: {error}") from error
    return state


def step_of(checkpoint: Path) -> int:
    """N of a directory checkpoint-N."""
    return int(CHECKPOINT.fullmatch(checkpoint.name).group(1))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of ``output_dir``, oldest first."""
    found = Path(output_dir).glob("checkpoint-*")  # a person may have put a "checkpoint-best" beside ours
    ours = (path for path in found if CHECKPOINT.fullmatch(path.name) and (path / "trainer_state.json").is_file())
    return sorted(ours, key=step_of)


def drop_old_checkpoints(output_dir: Path, save_total_limit: int | None) -> None:
    """Keep the newest ``save_total_limit`` checkpoints (all, if it is None or not positive)."""
    if is_main_process() and save_total_limit and save_total_limit > 0:
        for path in list_checkpoints(output_dir)[:-save_total_limit]:
            shutil.rmtree(path)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None, part: str = "") -> Path | None:
    """The checkpoint to go on from: None (start afresh), "true" (newest of ``output_dir``), or a checkpoint's path.

    Args:
        part: sub-directory that holds the checkpoints of one model of several ("policy", "value"); a path then names
            the checkpoint of any of them, e.g. output_dir/policy/checkpoint-3.
    Raises: UsageError if what was asked for is not there.
    """
    if resume_from_checkpoint in (None, "", "false", "False"):
        return None
    if resume_from_checkpoint in ("true", "True"):
        found = list_checkpoints(Path(output_dir) / part)
        if not found:
            raise UsageError(f'"resume_from_checkpoint": no checkpoint in {Path(output_dir) / part}')
        return found[-1]
    asked = Path(resume_from_checkpoint)
    path = asked.parent.parent / part / asked.name if part else asked
    if not (path / "trainer_state.json").is_file():
        raise UsageError(f'"resume_from_checkpoint": {path} is not a checkpoint (it has no trainer_state.json)')
    return path
