"""Alerts: what the metrics of a run say that a person should know, with the likely cause and the argument to change.

Written to output_dir/alerts.jsonl, a row when an alert begins, and said on the screen. A resumed run reads
metrics.jsonl again, so that it gives the alerts of one that was never interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment.runtime.console import say
from alignment.runtime.metrics import METRICS_FILE, is_main_process, keep_steps, told_faults
from alignment.training.health_rules import RULES, Row, Rule

ALERTS_FILE = "alerts.jsonl"


class Health:
    """A context manager that is shown every row of metrics.jsonl; on ranks other than 0 it does nothing.

    Args:
        args: the stage's arguments, for messages; ``output_dir`` is where the files are.
        start: the step that the run goes on after; rows up to it are in metrics.jsonl already.

    Raises: RunError, here or later, if alerts.jsonl cannot be written.
    """

    def __init__(self, args: Any, start: int) -> None:
        self.args, self.rows = args, {rule.name: [] for rule in RULES}
        self.active: set[str] = set()
        self._file, self._path = None, Path(args.output_dir) / ALERTS_FILE
        if not is_main_process():
            return
        keep_steps(self._path, start)
        if start > 0 and (metrics := self._path.with_name(METRICS_FILE)).exists():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                self._judge(json.loads(line))
        with told_faults(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a row, and tell what begins with it."""
        if self._file is None:
            return
        for rule, values in self._judge({name: float(value) for name, value in metrics.items()}):
            message = rule.tell(values, self.args)
            say(f"alert at step {step}: {rule.name}: {message}")
            row = {"step": int(step), "alert": rule.name, "message": message, "values": values}
            with told_faults(self._path):
                self._file.write(json.dumps(row, allow_nan=False) + "\n")
                self._file.flush()

    def _judge(self, metrics: Mapping[str, float | None]) -> list[tuple[Rule, Row]]:
        """The rules that hold from this row on and did not before, with the values to show."""
        begun = []
        for rule in RULES:
            row = {name: metrics.get(name) for name in rule.metrics}
            if any(value is None or not math.isfinite(value) for value in row.values()):
                continue
            rows = self.rows[rule.name]
            rows.append(row)
            del rows[rule.first : -rule.last]  # all that a rule looks at, however long the run
            values = rule.check(rows) if len(rows) == rule.first + rule.last else None
            if values is None:
                self.active.discard(rule.name)
            elif rule.name not in self.active:
                self.active.add(rule.name)
                begun.append((rule, values))
        return begun

    def __enter__(self) -> Health:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what a full disk did not take is lost, and has been told
                self._file.close()
