"""The samples that a run learns from: a resumed run has the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from alignment.runtime.faults import UsageError
from alignment.training.checkpoint import read_state
from data import TokenizedDataset

DATA = "data"  # in trainer_state.json


def fingerprints(datasets: Mapping[str, TokenizedDataset | None]) -> dict[str, str]:
    """For trainer_state.json: data sets by the arguments that name them (None: there is none) to SHA-256."""
    return {key: dataset.fingerprint for key, dataset in datasets.items() if dataset is not None}


def check_same_data(datasets: Mapping[str, TokenizedDataset | None], checkpoint: Path | None) -> None:
    """Raises UsageError, naming the argument, if the run that wrote ``checkpoint`` (None: none) had other samples.

    Checkpoints of older versions do not know theirs.
    """
    before = {} if checkpoint is None else read_state(checkpoint).get(DATA, {})
    for key, dataset in datasets.items():
        if dataset is not None and key in before and before[key] != dataset.fingerprint:
            raise UsageError(
                f'"{key}": not the samples of the run that {checkpoint} is of; for these, begin a run that has this '
                "checkpoint as its model"
            )
