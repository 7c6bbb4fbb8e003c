"""Reads what a stage left in its output directory: metrics.jsonl, samples.jsonl, run.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignment.runtime.faults import UsageError

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

    kind: a key of STAGE_TITLES, as run.json says it, or else told from the metrics' names.
    metrics: {name: {step: value}}, finite values only; a step written twice (after a resume) keeps its last value.
    samples: rows of samples.jsonl in file order; run: run.json; notes: what was missing, for the reader.
    """

    directory: Path
    kind: str
    metrics: dict[str, dict[int, float]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{STAGE_TITLES[self.kind]} ({self.directory.resolve().name})"

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 [n] in order and values float64 [n]; both empty if the metric was never written."""
        points = sorted(self.metrics.get(name, {}).items())
        return np.array([s for s, _ in points], dtype=np.int64), np.array([v for _, v in points], dtype=np.float64)


def read_stages(output_dir: Path) -> list[Stage]:
    """The stage in `output_dir`, or those in its direct sub-directories (by STAGE_ORDER, then by name).

    Raises UsageError when there is none or a file is corrupt.
    """
    if not output_dir.is_dir():
        raise UsageError(f"{output_dir}: no such directory")
    if (output_dir / "metrics.jsonl").exists():
        return [read_stage(output_dir)]
    folders = [path.parent for path in output_dir.glob("*/metrics.jsonl")]
    if not folders:
        raise UsageError(f"{output_dir}: no metrics.jsonl here or one level below; is it the output_dir of a run?")
    rank = {name: index for index, name in enumerate(STAGE_ORDER)}
    return [read_stage(path) for path in sorted(folders, key=lambda p: (rank.get(p.name, len(rank)), p.name))]


def read_stage(directory: Path) -> Stage:
    """Raises UsageError, naming file and line, for anything unreadable."""
    notes: list[str] = []
    metrics = _gather_metrics(_read_lines(directory / "metrics.jsonl", ("step",), notes))
    if not metrics:
        raise UsageError(f"{directory / 'metrics.jsonl'}: no metrics yet")
    run, samples = _read_run(directory / "run.json", notes), []
    kind = run["stage"] if run.get("stage") in STAGE_TITLES else _tell_kind(metrics)
    if kind == "ppo" or (directory / "samples.jsonl").exists():  # the other stages sample no answers
        samples = list(_read_lines(directory / "samples.jsonl", ("step", "prompt_id", "prompt", "answer"), notes))
    return Stage(directory, kind, metrics, samples, run, notes)


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
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name != "step" and is_number and math.isfinite(value):
                metrics.setdefault(name.removeprefix("train/"), {})[record["step"]] = float(value)
    return metrics


def _read_lines(path: Path, needed: tuple[str, ...], notes: list[str]) -> Iterable[dict[str, Any]]:
    """Rows of a JSON-lines file. A torn last line, left by a run that was killed, is noted and skipped."""
    if not path.exists():
        notes.append(f"{path.name} is missing.")
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                notes.append(f"The last line of {path.name} is incomplete and was skipped.")
                return
            raise UsageError(f"{path}, line {number}: not JSON: {error}") from error
        missing = [key for key in needed if key not in row] if isinstance(row, dict) else list(needed)
        if missing or not isinstance(row["step"], int):
            raise UsageError(f"{path}, line {number}: needs {', '.join(missing) or 'an integer step'}")
        yield row


def _read_run(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        notes.append(f"{path.name} is missing.")
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(run, dict):
        raise UsageError(f"{path}: not a JSON object")
    return run
