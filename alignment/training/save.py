"""One checkpoint on its way to the disk, in a thread of each process.

Every process writes its files and leaves a note of them, ``.rank-K``, in the partial directory that commits; the main
process's thread waits for all notes, writes SHA256SUMS and renames. The threads talk in no other way, so that training
may go on with its collectives meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from alignment.runtime.faults import process_count, process_number
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process
from alignment.training.checkpoint import commit, partial_of, recover
from alignment.training.sums import SUMS_FILE, Entry, measure, write_sums

_LOOK_SECONDS = 0.02
_DONE, _FAILED = ".done", ".failed"
Entries = dict[str, Entry]


class Save(threading.Thread):
    """Start it when the processes have collected what it writes.

    Args:
        output_dir, parts, step: checkpoint-<step> of every part is written, that of the first part commits.
        files: this process's files of every part, in the partial directories.
        afterwards: called on the main process once the checkpoint is in its place.

    Attributes:
        own_part: set when this process's files are written, or cannot be.
        fault: what went wrong, when the thread has ended.
    """

    def __init__(
        self, output_dir: Path, parts: Sequence[str], step: int, files: Sequence[Files], afterwards: Callable[[], None]
    ) -> None:
        # Python waits in the end for a thread that is no daemon: alone, a run that fails still writes its checkpoint.
        super().__init__(name=f"checkpoint-{step}", daemon=process_count() > 1)
        self.output_dir, self.parts, self.files, self.afterwards = output_dir, parts, files, afterwards
        self.directories = [output_dir / part / f"checkpoint-{step}" for part in parts]
        self.own_part, self.fault = threading.Event(), None

    def run(self) -> None:
        """See the module."""
        try:
            self._write_own_part()
        except Exception as fault:
            self.fault = fault
            self._tell_fault(fault)
        self.own_part.set()
        if is_main_process():
            try:
                self._commit()
                self.afterwards()
            except Exception as fault:
                self.fault = self.fault or fault
                recover(self.output_dir, self.parts)
                remove_partial(self.directories)

    def _write_own_part(self) -> None:
        entries = []
        for files in self.files:
            files.write()
            files.check()
            entries.append({name: measure(files.directory / name) for name in files.names})
        note = self._note(process_number())
        note.write_text(json.dumps(entries))
        os.replace(note, note.with_suffix(_DONE))

    def _tell_fault(self, fault: Exception) -> None:
        """The note is there already: renaming it needs no room on the disk."""
        note = self._note(process_number())
        with suppress(OSError):
            note.write_text(describe(fault))
        with suppress(OSError):
            os.replace(note, note.with_suffix(_FAILED))

    def _commit(self) -> None:
        entries = [_join(parts) for parts in zip(*map(self._read_note, range(process_count())), strict=True)]
        for number in range(process_count()):
            self._note(number).with_suffix(_DONE).unlink()
        for directory, own in list(zip(self.directories, entries, strict=True))[1:]:
            write_sums(partial_of(directory), own)
            name = os.path.relpath(directory / SUMS_FILE, self.directories[0])
            entries[0][Path(name).as_posix()] = measure(partial_of(directory) / SUMS_FILE)
        write_sums(partial_of(self.directories[0]), entries[0])
        commit(self.directories)

    def _read_note(self, number: int) -> list[Entries]:
        """The entries of a process's files, by part; waits for them."""
        note = self._note(number)
        while not note.with_suffix(_DONE).exists():
            if note.with_suffix(_FAILED).exists():
                raise self.fault or OSError(None, f"process {number}: {note.with_suffix(_FAILED).read_text()}")
            time.sleep(_LOOK_SECONDS)
        stored = json.loads(note.with_suffix(_DONE).read_text())
        return [{name: Entry(*entry) for name, entry in part.items()} for part in stored]

    def _note(self, number: int) -> Path:
        return partial_of(self.directories[0]) / f".rank-{number}.begun"


def prepare(directories: Sequence[Path]) -> None:
    """Make empty partial directories with a note for every process. The main process calls it, before the others add
    files."""
    for directory in directories:
        shutil.rmtree(partial_of(directory), ignore_errors=True)
        partial_of(directory).mkdir(parents=True)
    for number in range(process_count()):
        (partial_of(directories[0]) / f".rank-{number}.begun").touch()


def remove_partial(directories: Sequence[Path]) -> None:
    """Give back the room that an unfinished checkpoint takes."""
    for directory in directories:
        shutil.rmtree(partial_of(directory), ignore_errors=True)


def describe(fault: BaseException) -> str:
    """What the system says of a fault."""
    return fault.strerror or str(fault) if isinstance(fault, OSError) else f"{type(fault).__name__}: {fault}"


def _join(parts: Sequence[Entries]) -> Entries:
    return {name: entry for part in parts for name, entry in part.items()}
