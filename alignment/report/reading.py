"""Reads what a stage left in its output directory: metrics.jsonl, samples.jsonl, alerts.jsonl, run.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignment.runtime.faults import UsageError

MARKS = ("metrics.jsonl", "run.json")  # a directory with one of them is a run's
LEVELS = ("", "*/", "*/*/")  # where runs are looked for: a pipeline's stages, and those of a game's rounds
LARGEST = 1e300  # numbers beyond it are no measurement, and nothing can be drawn with them
STAGE_ORDER = ("sft", "rm", "offline", "update", "ppo")
STAGE_TITLES = {
    "sft": "Supervised fine-tuning",
    "rm": "Reward model",
    "offline": "Logged answers",
    "update": "Policy update",
    "ppo": "Online RL",
}


@dataclass
class Stage:
    """What one stage wrote.

    name: tells it from the other runs of the page. kind: a key of STAGE_TITLES, as run.json says it, or else told
    from the metrics' names.
    metrics: {name: {step: value}}, finite values only; a step written twice (after a resume) keeps its last value.
    samples: rows of samples.jsonl in file order; alerts: rows of alerts.jsonl; run: run.json; notes: what was missing
    or damaged, for the reader.
    """

    directory: Path
    kind: str
    metrics: dict[str, dict[int, float]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""

    @property
    def title(self) -> str:
        return f"{STAGE_TITLES[self.kind]} ({self.name or self.directory.resolve().name})"

    @property
    def unit(self) -> str:
        """What a step is called."""
        return "iteration" if self.kind == "ppo" else "step"

    @property
    def rank(self) -> int:
        """Place in a pipeline."""
        return STAGE_ORDER.index(self.kind)

    @property
    def arguments(self) -> dict[str, Any]:
        """As run.json resolved them; empty if it does not say."""
        arguments = self.run.get("arguments")
        return arguments if isinstance(arguments, dict) else {}

    @property
    def last_step(self) -> int:
        return max((max(points) for points in self.metrics.values()), default=0)

    def final(self, name: str) -> float | None:
        """The last value of a metric."""
        points = self.metrics.get(name)
        return points[max(points)] if points else None

    def phases(self, quantity: str) -> dict[str, dict[int, float]]:
        """{phase: {step: value}} of the metrics `<quantity>/<phase>`."""
        prefix = f"{quantity}/"
        return {name.removeprefix(prefix): points for name, points in self.metrics.items() if name.startswith(prefix)}

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 [n] in order and values float64 [n]; both empty if the metric was never written."""
        points = sorted(self.metrics.get(name, {}).items())
        return np.array([s for s, _ in points], dtype=np.int64), np.array([v for _, v in points], dtype=np.float64)


def read_stages(*output_dirs: Path) -> list[Stage]:
    """The runs in `output_dirs`, each a stage's directory or one with those of stages in it, up to two levels deep.

    Those of one directory are in the order of STAGE_ORDER, then by name, and all of them before those of directories
    in it. What is missing or damaged is in their notes.
    Raises UsageError for a directory without a run, and where no run has a metric.
    """
    folders = dict.fromkeys(folder for output_dir in output_dirs for folder in _find_runs(output_dir))
    stages = [read_stage(folder) for folder in folders]
    if not any(stage.metrics for stage in stages):
        first = stages[0]
        raise UsageError(f"{first.directory / 'metrics.jsonl'}: no metrics yet; {' '.join(first.notes)}".rstrip("; "))
    if len(stages) > 1:
        shared = os.path.commonpath([folder.parent for folder in folders])
        for stage, folder in zip(stages, folders, strict=True):
            stage.name = str(folder.relative_to(shared))
    return stages


def _find_runs(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        raise UsageError(f"{output_dir}: no such directory")
    found = {mark.parent for level in LEVELS for name in MARKS for mark in output_dir.glob(f"{level}{name}")}
    if not found:
        raise UsageError(
            f"{output_dir}: no metrics.jsonl here or up to two levels below; is it the output_dir of a run?"
        )
    runs = [path for path in found if found.isdisjoint(path.parents)]  # what a run has in it is no other run
    return [path.resolve() for path in sorted(runs, key=lambda path: _place(path.relative_to(output_dir).parts))]


def _place(names: tuple[str, ...]) -> tuple:
    """A path's place among others: the nearer first, stages in their order, numbers by their size."""
    rank = {name: index for index, name in enumerate(STAGE_ORDER)}
    words = [(rank.get(name, len(rank)), re.split(r"(\d+)", name)) for name in names]
    return len(names), [(place, [int(word) if word.isdecimal() else word for word in parts]) for place, parts in words]


def read_stage(directory: Path) -> Stage:
    """What is there; what is not, or cannot be read, is in the notes."""
    notes: list[str] = []
    metrics = _gather_metrics(_read_lines(directory / "metrics.jsonl", (), notes))
    run = _read_run(directory / "run.json", notes)
    kind = run["stage"] if run.get("stage") in STAGE_ORDER else _tell_kind(metrics)
    samples, alerts = [], []
    if kind == "ppo" or (directory / "samples.jsonl").exists():  # the other stages sample no answers
        samples = list(_read_lines(directory / "samples.jsonl", ("prompt_id", "prompt", "answer"), notes))
    if (directory / "alerts.jsonl").exists():
        alerts = list(_read_lines(directory / "alerts.jsonl", ("alert", "message"), notes))
    return Stage(directory, kind, metrics, samples, run, notes, alerts)


def _tell_kind(metrics: Iterable[str]) -> str:
    names = set(metrics)
    if "logged/answers" in names:
        return "offline"
    if names & {"eval/reward_mean", "rollout/reward_mean", "objective/kl", "loss/policy_avg"}:
        return "ppo"
    if names & {"rewards/margin", "rank_loss"}:
        return "update"
    return "rm" if names & {"eval/margin", "margin", "eval/accuracy"} else "sft"


def _gather_metrics(records: Iterable[dict[str, Any]]) -> dict[str, dict[int, float]]:
    metrics: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and (number := finite(value)) is not None:
                metrics.setdefault(name.removeprefix("train/"), {})[record["step"]] = number
    return metrics


def finite(value: Any) -> float | None:
    """A value of a JSON file as a number, or None if it is none that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        return None
    return float(value)


def _read_lines(path: Path, needed: tuple[str, ...], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file that have an integer "step" and what is `needed`; others are noted and skipped."""
    lines = _read_bytes(path, notes).split(b"\n")
    damaged = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse(line)
        if isinstance(row, dict) and _is_step(row.get("step")) and all(_is_plain(row.get(key)) for key in needed):
            yield row
        elif row is None and number == len(lines):  # left by a run that was killed, or is writing now
            notes.append(f"The last line of {path.name} is incomplete and was skipped.")
        else:
            damaged.append(number)
    if damaged:
        where = f"line {damaged[0]}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else "")
        notes.append(f"{path.name} is damaged: {where} skipped.")


def _parse(content: bytes) -> Any:
    """What JSON says, or None."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _read_bytes(path: Path, notes: list[str]) -> bytes:
    """Empty, and noted, if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
    except OSError as fault:
        notes.append(f"{path.name} cannot be read: {fault}.")
    return b""


def _read_run(path: Path, notes: list[str]) -> dict[str, Any]:
    known = len(notes)
    run = _parse(_read_bytes(path, notes))
    if isinstance(run, dict):
        return run
    if len(notes) == known:
        notes.append(f"{path.name} is damaged and was skipped.")
    return {}
