"""The frozen models of a run, told from others by the SHA-256 of their weight files: a resumed run has the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from alignment.ppo.models.loading import resolve_model_directory
from alignment.ppo.models.weights import weights_sha256
from alignment.runtime.faults import UsageError
from alignment.training.checkpoint import read_state

FROZEN = "frozen_models"  # in trainer_state.json
Prints = dict[str, dict[str, str]]  # by argument: "directory", "sha256"


def fingerprints(names: Mapping[str, str | None]) -> Prints:
    """For trainer_state.json, of the models that can be loaded. Every process of the job calls it.

    Args: names: of the models, by the arguments that have them; None: there is no such model.
    """
    directories = {key: resolve_model_directory(name) for key, name in names.items() if name}
    return {key: {"directory": str(path), "sha256": weights_sha256(path)} for key, path in directories.items()}


def check_unchanged(prints: Prints, checkpoint: Path) -> None:
    """Raises UsageError, naming the argument, if the run that wrote ``checkpoint`` had other weights.

    Checkpoints of older versions do not know theirs.
    """
    before = read_state(checkpoint).get(FROZEN, {})
    for key, now in prints.items():
        then = before.get(key, now)
        if then["sha256"] != now["sha256"]:
            raise UsageError(
                f'"{key}": the weights in {now["directory"]} are not those that {checkpoint} was trained with, which '
                f"were in {then['directory']}"
            )
