"""A few rows of the run's data, or of what stands in for them."""

from __future__ import annotations

import pytest

from alignment.dry_run.datasets import ROWS, few_rows
from data import DataError
from data.spec import DatasetSpec

NONE = {"dataset_modules": [], "eval_datasets": None}


def test_the_runs_own_rows_are_few():
    values = NONE | {"train_datasets": "hh-excerpt/train:0.01, hh-excerpt/test:3/-1", "ptx_datasets": {"local": 0}}
    taken, notes = few_rows(values)
    assert taken == {
        "train_datasets": [
            DatasetSpec("hh-excerpt/train", 0.01, ROWS),
            DatasetSpec("hh-excerpt/test", 1.0, 3),
        ],
        "ptx_datasets": [DatasetSpec("local", 0.0, 0)],
    }
    assert notes == []


def test_nothing_is_downloaded(tmp_path):
    values = NONE | {
        "train_datasets": f"alpaca, tldr/train, hh-excerpt/test, alpaca:1:{tmp_path}",
        "eval_datasets": "hh-excerpt/test, alpaca",
    }
    taken, notes = few_rows(values)
    names = {key: [(spec.name, spec.path) for spec in specs] for key, specs in taken.items()}
    assert names == {
        "train_datasets": [("hh-excerpt/test", None), ("alpaca", str(tmp_path)), ("hh-excerpt/train", None)],
        "eval_datasets": [("hh-excerpt/test", None)],
    }
    assert notes == [
        "train_datasets: hh-excerpt/train stands in for alpaca, tldr/train, which would be downloaded",
        "eval_datasets: hh-excerpt/test stands in for alpaca, which would be downloaded",
    ]


@pytest.mark.parametrize(("name", "kept"), [("hh-excerpt/test", {"hh-excerpt/test": 1}), ("alpaca", None)])
def test_weights_name_data_sets_that_are_here(name, kept):
    taken, _ = few_rows(NONE | {"train_datasets": name, "sampling_weights": {name: 1}})
    assert taken.get("sampling_weights", {name: 1}) == kept


def test_an_unknown_name_is_refused():
    with pytest.raises(DataError, match="unknown dataset 'alpacca'"):
        few_rows(NONE | {"train_datasets": "alpacca"})
