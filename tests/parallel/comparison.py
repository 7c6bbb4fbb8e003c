"""Launching trajectories.py, and comparing what two launches left behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.stages import CHECKOUT, read_rows, weights_of

SCRIPT = CHECKOUT / "tests/parallel/trajectories.py"
TIMES = ("timing_s/", "memory_gb/", "perf/")
# Relative 1e-4, as promised; the absolute part is float32 rounding: of sums of some 30 nats in the metrics that are
# differences of log-probabilities, and of weights of size 0.1 to 1.
METRICS_CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROUNDING = {"atol": 1e-4}  # of the largest difference between sampling and training, which is nothing but rounding
WEIGHTS_CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@dataclass(frozen=True)
class Launch:
    """A layout: processes, into how many shares they divide the samples, accumulation, further arguments."""

    name: str
    processes: int = 1
    data_size: int = 1
    accumulation: int = 1
    arguments: str = ""

    def run(self, project: Path, out: Path, scenarios: str, *more: object) -> Path:
        """Run a set of scenarios; returns ``out``. Raises AssertionError with the log if the job fails."""
        own = ["--data_size", self.data_size, "--accumulation", self.accumulation, *self.arguments.split(), *more]
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", self.processes, "--log_dir", f"{out}.log"]
        command = [sys.executable, "-u", *launcher, SCRIPT, project, out, scenarios, *own]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, f"{self.name}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
        return out


def metrics_of(folder: Path, after: int = -1) -> list[dict[str, float]]:
    """Rows of metrics.jsonl of steps > ``after``, without those that measure time or memory."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] > after]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def assert_same_trajectory(expected: Path, found: Path, after: int = -1) -> None:
    """Both output directories tell the same story: metrics, sampled tokens, answers and final weights."""
    assert_same_metrics(metrics_of(expected, after), metrics_of(found, after))
    if (expected / "rollouts.npz").exists() and after < 0:
        assert_same_rollouts(expected, found)
    checkpoints = sorted(path.parent.relative_to(expected) for path in expected.rglob("trainer_state.json"))
    assert checkpoints
    for checkpoint in checkpoints:
        if int(checkpoint.name.removeprefix("checkpoint-")) > after:
            assert_same_weights(expected / checkpoint, found / checkpoint)


def assert_same_metrics(expected: list[dict], found: list[dict]) -> None:
    """Same steps, same names, same values."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(expected, found, strict=True):
        assert other.keys() == row.keys()
        for name, value in row.items():
            close = ROUNDING if name == "rollout/probs_diff_max" else METRICS_CLOSE
            np.testing.assert_allclose(other[name], value, **close, err_msg=f"step {row['step']}: {name}")


def assert_same_rollouts(expected: Path, found: Path) -> None:
    """The same tokens were sampled, with the same log-probabilities, and the same answers shown."""
    one, other = np.load(expected / "rollouts.npz"), np.load(found / "rollouts.npz")
    assert set(one.files) == set(other.files)
    for name in one.files:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(other[name], one[name], **METRICS_CLOSE, err_msg=name)
        else:
            np.testing.assert_array_equal(other[name], one[name], err_msg=name)
    answers = [[row["answer"] for row in read_rows(folder / "samples.jsonl")] for folder in (expected, found)]
    assert answers[0] == answers[1]


def assert_same_weights(expected: Path, found: Path) -> None:
    """Two checkpoints hold the same model, whatever files it is divided into."""
    one, other = weights_of(expected), weights_of(found)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, **WEIGHTS_CLOSE, err_msg=f"{expected.name} {name}")
