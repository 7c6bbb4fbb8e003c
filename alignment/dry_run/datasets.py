"""The data of a dry run: a few rows of the run's own, or of the embedded excerpt where those would be downloaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data import RawDataset, load_dataset_modules
from data.spec import DatasetSpec, parse_specs

ROWS = 32  # of each data set
STAND_INS = {
    "train_datasets": "hh-excerpt/train",
    "eval_datasets": "hh-excerpt/test",
    "ptx_datasets": "hh-excerpt/train",
}


def few_rows(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The data arguments of a dry run, and a line for each that others stand in for.

    Raises: DataError as in a real run: an unknown name, a proportion that is none, a module that fails.
    """
    load_dataset_modules(values["dataset_modules"])
    taken: dict[str, Any] = {}
    notes = []
    for key, stand_in in STAND_INS.items():
        if not values.get(key):
            continue
        specs = parse_specs(values[key])
        here = [spec for spec in specs if _is_local(spec)]
        missing = [spec.name for spec in specs if spec not in here]
        if missing:
            notes.append(f"{key}: {stand_in} stands in for {', '.join(missing)}, which would be downloaded")
        if missing and stand_in not in {spec.name for spec in here}:
            here.append(DatasetSpec(stand_in))
        taken[key] = [replace(spec, count=_rows(spec)) for spec in here]
        if missing and key == "train_datasets" and values.get("sampling_weights"):
            taken["sampling_weights"] = None  # they name the data sets
    return taken, notes


def _is_local(spec: DatasetSpec) -> bool:
    return isinstance(spec.dataset, RawDataset) or RawDataset.find(spec.dataset).is_local(spec.path)


def _rows(spec: DatasetSpec) -> int:
    return min(ROWS, ROWS * math.ceil(spec.proportion) if spec.count is None else spec.count)
