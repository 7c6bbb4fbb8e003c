"""Output of a command that may take hours: what is finished stays finished when the command is killed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignment.apo.files import write_items
from alignment.parallel.collectives import gather_objects
from alignment.runtime.console import say
from alignment.runtime.faults import UsageError
from alignment.runtime.metrics import is_main_process

STOPPED = "SIGTERM; finished batches are kept, to go on run the same command again"  # for ``stoppable``


class ResumableOutput:
    """Results by name, kept in ``<output>.partial.jsonl`` batch by batch until they are all there.

    The first line of that file says what the command was asked; each other line is the results of one batch, so that
    a batch is finished or not begun. Every process of the job makes one; the main process alone touches files.

    Args:
        output: the file to write in the end.
        asked: JSON values, by name, that the results depend on.
        overwrite: an output that is there may be replaced, and unfinished results of something else forgotten.

    Attributes: done: the results so far, JSON values by name, on every process.

    Raises: UsageError if ``output`` exists, or its unfinished results are of something else than ``asked``.
    """

    def __init__(self, output: str | Path, asked: dict[str, Any], overwrite: bool = False) -> None:
        self.output = Path(output)
        self.partial = self.output.with_name(f"{self.output.name}.partial.jsonl")
        done = self._open(json.loads(json.dumps(asked)), overwrite) if is_main_process() else None
        self.done: dict[str, Any] = gather_objects(done, "world")[0]
        if self.done:
            say(f"{self.partial}: going on after {len(self.done)} finished results")

    def add(self, results: dict[str, Any]) -> None:
        """One batch is finished; on disk when this returns."""
        self.done |= results
        if is_main_process():
            _append(self.partial, results)

    def finish(self, items: Iterable[dict[str, Any]]) -> None:
        """All is done: write the output, remove what was kept meanwhile."""
        if is_main_process():
            write_items(self.output, items)
            self.partial.unlink(missing_ok=True)

    def _open(self, asked: dict[str, Any], overwrite: bool) -> dict[str, Any]:
        if self.output.exists() and not overwrite:
            raise self._refuse("exists already; name another")
        before, *batches = _read_whole_lines(self.partial) or [asked]
        changed = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
        if batches and changed and not overwrite:
            then, now = (f"{json.dumps(values.get(changed[0])):.60}" for values in (before, asked))
            raise self._refuse(f'was begun with "{changed[0]}": {then}, which is {now} now; name another')
        if batches and not changed:
            return {name: result for batch in batches for name, result in batch.items()}
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.partial.write_text("")
            _append(self.partial, asked)
        except OSError as fault:
            raise UsageError(f'"output_file": {self.output} cannot be written: {fault.strerror}') from None
        return {}

    def _refuse(self, problem: str) -> UsageError:
        remedy = 'or set "overwrite_output_file": true to replace it'
        return UsageError(f'"output_file": {self.output} {problem}, {remedy}')


def digest(*values: Any) -> str:
    """Tells JSON values from others."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The values of a JSON-lines file; a last line that was cut short is removed from it."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise UsageError(f"{path}: is damaged; remove it to begin anew") from None
