"""What metrics can be written to beside metrics.jsonl: VisualDL, TensorBoard, wandb."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from alignment.runtime.faults import UsageError

VISUALDL_FILE = "vdlrecords.metrics.log"  # VisualDL reads files whose names have "vdlrecords" in them
WANDB_ID_FILE = "wandb_id.txt"


class Writer(Protocol):
    """Takes finite values."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_writer(
    name: str, logging_dir: Path, output_dir: Path, rows: Iterable[Mapping[str, Any]], resume_from: int | None
) -> Writer:
    """One of WRITERS.

    Args:
        logging_dir: VisualDL's and TensorBoard's files are in its sub-directories of these names.
        output_dir: wandb's files, and the id of its run, are here.
        rows: of metrics.jsonl, as far as the run goes on with them.
        resume_from: see alignment.runtime.metrics.MetricsWriter.
    Raises: UsageError if wandb cannot start.
    """
    if name == "visualdl":
        return VisualDL(logging_dir / name, rows)
    if name == "tensorboard":
        return TensorBoard(logging_dir / name, resume_from)
    return Wandb(output_dir, keeps_id=resume_from != 0)


def check_installed(names: Iterable[str]) -> None:
    """Raises UsageError for wandb where it is not installed: it is no requirement of this toolkit."""
    if "wandb" in names and find_spec("wandb") is None:
        raise UsageError('"report_to": "wandb" needs the package wandb, which is not installed: pip install wandb')


class VisualDL:
    """One file, written anew from metrics.jsonl whenever a run goes on: VisualDL has nothing that takes steps back."""

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        from visualdl import LogWriter

        (folder / VISUALDL_FILE).unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            self._writer = LogWriter(logdir=str(folder), file_name=VISUALDL_FILE)
        for row in rows:
            self.write(row["step"], {name: value for name, value in row.items() if name != "step"})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class TensorBoard:
    """A file for each start; a resumed run's says that later steps in the files before it do not count any more."""

    def __init__(self, folder: Path, resume_from: int | None) -> None:
        from tensorboardX import SummaryWriter

        first = resume_from + 1 if resume_from else resume_from  # a fresh run evaluates as step 0
        self._writer = SummaryWriter(logdir=str(folder), purge_step=first)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """The same wandb run over resumes; WANDB_MODE, WANDB_PROJECT and the like are wandb's own affair.

    wandb cannot take steps back, so a resumed run writes only those that wandb has not seen.
    """

    def __init__(self, output_dir: Path, keeps_id: bool) -> None:
        try:
            import wandb
        except ImportError as fault:  # its releases differ in the protobuf they need
            raise UsageError(f'"report_to": wandb cannot be imported: {fault}') from fault
        id_file, record = output_dir / WANDB_ID_FILE, output_dir / "run.json"
        known = id_file.read_text(encoding="utf-8").strip() if keeps_id and id_file.exists() else None
        config = json.loads(record.read_text(encoding="utf-8"))["arguments"] if record.exists() else None
        try:
            self._run = wandb.init(
                dir=str(output_dir),
                project=os.environ.get("WANDB_PROJECT", "paddle-alignment"),
                name=output_dir.resolve().name,
                id=known,
                resume="allow",
                config=config,
            )
        except wandb.Error as fault:
            reason = " ".join(str(fault).split())
            message = f'"report_to": wandb cannot start: {reason} (WANDB_MODE=offline needs no server)'
            raise UsageError(message) from fault
        id_file.write_text(self._run.id + "\n", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.starting_step:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
