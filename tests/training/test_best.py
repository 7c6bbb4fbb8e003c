"""Which evaluation was the best, when to stop, and that both survive a checkpoint."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from alignment.ppo.models.loading import newest_checkpoint
from alignment.runtime.faults import UsageError
from alignment.training.best import BestTracker


def make_tracker(metric="eval/loss", greater=False, patience=None, first=1):
    args = SimpleNamespace(
        metric_for_best_model=metric, greater_is_better=greater, early_stopping_patience=patience,
        load_best_model_at_end=True,
    )  # fmt: skip
    return BestTracker(args, first)


def observe(tracker, values):
    for step, value in values.items():
        tracker.observe(step, {"eval/loss": value, "eval/other": 1.0})
    return tracker.best_step, tracker.best_metric


@pytest.mark.parametrize(
    ("greater", "values", "best"),
    [
        (False, {0: 0.1, 2: 3.0, 4: 2.0, 6: 2.5}, (4, 2.0)),  # the untrained model has no checkpoint
        (True, {2: 3.0, 4: 2.0, 6: 3.0}, (2, 3.0)),  # as good is not better
        (False, {2: math.nan, 4: 2.0, 6: -math.inf}, (4, 2.0)),
        (False, {0: 1.0}, (None, None)),
    ],
)
def test_best(greater, values, best):
    assert observe(make_tracker(greater=greater), values) == best


def test_patience_counts_evaluations_in_a_row_and_survives_a_checkpoint():
    tracker = make_tracker(patience=2)
    observe(tracker, {1: 3.0, 2: 3.5, 3: 2.0, 4: 2.1})
    assert not tracker.is_exhausted
    resumed = make_tracker(patience=2)
    resumed.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert observe(resumed, {5: 2.0}) == (3, 2.0) and resumed.is_exhausted
    other = make_tracker(metric="eval/other", patience=2)
    other.load_state_dict(resumed.state_dict())  # says nothing about another metric
    assert other.best_step is None and not other.is_exhausted


def test_an_unknown_metric_is_refused_at_the_first_evaluation():
    message = '"metric_for_best_model": "eval/los" is not among .*: eval/loss, eval/other'
    with pytest.raises(UsageError, match=message):
        observe(make_tracker(metric="eval/los"), {0: 1.0})
    late = make_tracker(metric="eval/los", first=3)  # the first ones say nothing about the policy yet
    observe(late, {0: 1.0, 2: 1.0})
    with pytest.raises(UsageError, match=message):
        observe(late, {3: 1.0})


def test_without_a_metric_nothing_is_kept():
    tracker = make_tracker(metric=None)
    assert observe(tracker, {1: 2.0}) == (None, None) and tracker.state_dict() == {}


@pytest.mark.parametrize(
    ("state", "chosen"),
    [
        ({"best_step": 2, "load_best_model_at_end": True}, 2),
        ({"best_step": 2, "load_best_model_at_end": False}, 6),
        ({"best_step": 3, "load_best_model_at_end": True}, 6),  # somebody removed it
        ({"best_step": None, "load_best_model_at_end": True}, 6),
        ({}, 6),
        ([], 6),
    ],
)
def test_a_run_directory_stands_for_its_best_checkpoint_where_it_was_told_to(tmp_path, state, chosen):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
    assert newest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{chosen}"
