"""Writes a run's metrics: always metrics.jsonl, and VisualDL, TensorBoard or wandb by `report_to`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignment.runtime.faults import RunError
from alignment.runtime.files import write_bytes
from alignment.runtime.writers import Writer, open_writer

METRICS_FILE = "metrics.jsonl"


def is_main_process() -> bool:
    """Whether this is the launcher's rank 0, or the only process; asks the environment, not Paddle."""
    return int(os.environ.get("PADDLE_TRAINER_ID") or 0) == 0


class MetricsWriter:
    """A context manager; on ranks other than 0 it writes nothing.

    Args:
        args: a stage's arguments; `report_to` (list of "visualdl", "tensorboard", "wandb") and `logging_dir` are used.
        output_dir: where metrics.jsonl is; lines are appended to it.
        resume_from: keep only what was written up to this step, so that a resumed run writes no step twice;
            0 starts the file anew, None keeps everything.

    Raises: UsageError if wandb cannot start.
    """

    def __init__(self, args: Any, output_dir: str | Path, resume_from: int | None = None) -> None:
        self._file, self._path = None, Path(output_dir) / METRICS_FILE
        self._writers: list[Writer] = []
        if not is_main_process():
            return
        with told_faults(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if resume_from is not None:
                keep_steps(self._path, resume_from)
            self._file = self._path.open("a", encoding="utf-8")
        folder = Path(getattr(args, "logging_dir", None) or Path(output_dir) / "runs")
        for name in getattr(args, "report_to", None) or ():
            self._writers.append(open_writer(name, folder, Path(output_dir), _rows(self._path), resume_from))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line {"step": step, **metrics}, on disk when this returns. A value that is not finite becomes null."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        row = {"step": int(step)} | {name: finite.get(name) for name in values}
        with told_faults(self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        for writer in self._writers:
            writer.write(int(step), finite)

    def close(self) -> None:
        """Safe to call twice."""
        for writer in self._writers:
            writer.close()
        self._writers = []
        if self._file is not None:
            with suppress(OSError):  # what a full disk did not take is lost, and has been told
                self._file.close()
            self._file = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def told_faults(path: Path) -> Iterator[None]:
    """Raises RunError, naming the file and the reason, if what is done within it cannot be written."""
    try:
        yield
    except OSError as fault:
        raise RunError(f"{path}: cannot be written: {fault.strerror or fault}") from fault


def keep_steps(path: Path, last: int) -> None:
    """Drops a JSON-lines file's rows after step `last`, and a last row that a killed run left half-written.

    Raises: RunError if it cannot be written.
    """
    kept = []
    if not path.exists():
        return
    for line, row in _read_lines(path) if last > 0 else ():
        with suppress(KeyError, TypeError):
            if row["step"] <= last:
                kept.append(line.removesuffix(b"\n") + b"\n")
    with told_faults(path):
        write_bytes(path, b"".join(kept))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in _read_lines(path))


def _read_lines(path: Path) -> Iterator[tuple[bytes, Any]]:
    """The lines of a JSON-lines file and what they say; those that a killed run left half-written are passed over.

    In bytes: a line ends at its newline alone, not at U+2028 in an answer, and may be cut inside a character.
    """
    with path.open("rb") as lines:
        for line in lines:
            with suppress(ValueError):
                yield line, json.loads(line)
