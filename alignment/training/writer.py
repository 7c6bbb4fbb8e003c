"""Writes a run's checkpoints, each as one act, and if so asked while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from alignment.parallel.collectives import barrier, gather_objects
from alignment.runtime.console import say
from alignment.runtime.faults import RunError, process_count
from alignment.runtime.files import Files
from alignment.runtime.metrics import is_main_process
from alignment.training.best import BestTracker
from alignment.training.checkpoint import Collect, drop_old_checkpoints, list_checkpoints, partial_of
from alignment.training.save import Save, describe, prepare, remove_partial


class _Problem(NamedTuple):
    reason: str
    is_of_disk: bool

    @classmethod
    def of(cls, fault: BaseException | None) -> _Problem | None:
        return None if fault is None else cls(describe(fault), isinstance(fault, OSError))


class CheckpointWriter:
    """What a trainer saves with. Every process makes one, and calls its methods in the same order.

    Args:
        args: a stage's arguments: output_dir, save_total_limit, use_async_save, save_error.
        best: the checkpoint of its best step is kept.
        parts: sub-directories of output_dir with a checkpoint each, the one that commits first; or "" for itself.

    Attributes: saved_step: of the newest checkpoint that is known to be written, or None.
    """

    def __init__(self, args: Any, best: BestTracker, parts: Sequence[str] = ("",)) -> None:
        self.output_dir, self.parts, self.best = Path(args.output_dir), tuple(parts), best
        self.save_total_limit = args.save_total_limit
        self.is_async, self.may_skip = bool(args.use_async_save), args.save_error == "skip"
        self.saved_step: int | None = None
        self._save: Save | None = None
        self._step = 0

    def save(self, step: int, contents: Mapping[str, Collect]) -> None:
        """Write checkpoint-<step>, or with use_async_save begin to.

        Args: contents: by part, what adds its files, as alignment.training.checkpoint.content gives it.
        Raises: RunError if it, or the one before, cannot be written.
        """
        self.wait()
        self._step = step
        directories = [self.output_dir / part / f"checkpoint-{step}" for part in self.parts]
        problem = gather_objects(_prepare(directories) if is_main_process() else None, "world")[0]
        if problem is not None:
            self._settle(problem)
            return
        files = {part: Files(partial_of(d), self.is_async) for part, d in zip(self.parts, directories, strict=True)}
        for part, collect in contents.items():
            collect(files[part])
        keep = () if self.best.best_step is None else (self.best.best_step,)
        drop = partial(drop_old_checkpoints, self.output_dir, self.save_total_limit, self.parts, keep)
        self._save = Save(self.output_dir, self.parts, step, [files[part] for part in self.parts], drop)
        self._save.start()
        if not self.is_async:
            self.wait()

    def check(self) -> None:
        """Raises RunError if a checkpoint that is being written cannot be; waits for nobody."""
        save = self._save
        if save is None or save.is_alive() or save.fault is None:
            return
        if process_count() == 1:
            self.wait()
        elif not (self.may_skip and isinstance(save.fault, OSError)):
            raise self._fault(_Problem.of(save.fault))

    def wait(self) -> None:
        """Until the checkpoint that is being written is in its place; raises RunError if it cannot be."""
        save, self._save = self._save, None
        if save is None:
            return
        save.own_part.wait()
        barrier()  # a process that has ended shows here, so that nobody waits for its note
        save.join()
        problems = gather_objects(_Problem.of(save.fault), "world")
        self._settle(next(filter(None, problems), None))

    def finish(self) -> None:
        """As ``wait``, and the newest checkpoint must be there, whatever save_error says."""
        self.wait()
        if self.saved_step != self._step:
            raise RunError(f"{self._directory}: the run's last checkpoint could not be written; {self._before()}")

    def _settle(self, problem: _Problem | None) -> None:
        if problem is None:
            self.saved_step = self._step
        elif self.may_skip and problem.is_of_disk:
            say(f"notice: {self._fault(problem)}; training goes on without it")
        else:
            raise self._fault(problem)

    def _fault(self, problem: _Problem) -> RunError:
        return RunError(f"{self._directory}: this checkpoint could not be written: {problem.reason}; {self._before()}")

    @property
    def _directory(self) -> Path:
        return self.output_dir / self.parts[0] / f"checkpoint-{self._step}"

    def _before(self) -> str:
        found = [path.name for path in list_checkpoints(self.output_dir / self.parts[0]) if path != self._directory]
        return f"{found[-1]} before it is intact" if found else "there is none before it"


def _prepare(directories: Sequence[Path]) -> _Problem | None:
    try:
        prepare(directories)
    except OSError as fault:
        remove_partial(directories)
        return _Problem.of(fault)
    return None
