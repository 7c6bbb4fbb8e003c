"""Which evaluation was the best, and when there were enough without a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignment.runtime.faults import UsageError


class BestTracker:
    """The best evaluation so far by metric_for_best_model; does nothing where that is None.

    Args:
        args: a stage's arguments.
        first: evaluations before this step are not compared: those of the untrained model, or of logged data before
            the policy's first step.

    Attributes: best_step, best_metric: of the best evaluation, None before there was one.
    """

    def __init__(self, args: Any, first: int = 1) -> None:
        self.metric, self.first = args.metric_for_best_model, first
        self._sign = 1.0 if args.greater_is_better else -1.0
        self._patience, self._loads_best = args.early_stopping_patience, bool(args.load_best_model_at_end)
        self.best_step: int | None = None
        self.best_metric: float | None = None
        self._waited = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether early_stopping_patience evaluations in a row were no better than the best."""
        return self.metric is not None and self._patience is not None and self._waited >= self._patience

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation after ``step`` steps, by its metrics' full names. Raises UsageError for an unknown metric."""
        if self.metric is None or not metrics or (step < self.first and self.first > 1):
            return
        if self.metric not in metrics:
            raise UsageError(
                f'"metric_for_best_model": "{self.metric}" is not among the metrics of an evaluation: '
                f"{', '.join(sorted(metrics))}"
            )
        if step < self.first:
            return
        value = float(metrics[self.metric])
        if math.isfinite(value) and (self.best_metric is None or self._sign * (value - self.best_metric) > 0):
            self.best_step, self.best_metric, self._waited = step, value, 0
        else:
            self._waited += 1

    def state_dict(self) -> dict:
        """Plain JSON for trainer_state.json."""
        if self.metric is None:
            return {}
        return {
            "metric_for_best_model": self.metric,
            "best_metric": self.best_metric,
            "best_step": self.best_step,
            "evaluations_without_improvement": self._waited,
            "load_best_model_at_end": self._loads_best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state_dict`` gave (the whole trainer_state.json); of another metric, nothing."""
        if self.metric is not None and state.get("metric_for_best_model") == self.metric:
            self.best_metric, self.best_step = state["best_metric"], state["best_step"]
            self._waited = state["evaluations_without_improvement"]
