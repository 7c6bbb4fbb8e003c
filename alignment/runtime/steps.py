"""Commands run one after another, with a record on disk: what is finished is not done again after an interruption."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from alignment.runtime.argument_fields import without_secrets
from alignment.runtime.faults import UsageError
from alignment.runtime.files import write_text
from alignment.runtime.lock import lock
from alignment.runtime.termination import Stopped

CHECKOUT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1
_HOW_TO_GO_ON = "SIGTERM, which the running step got too; to go on, run the same command again"


@dataclass(frozen=True)
class Step:
    """A command that a user could type.

    name: of no other step; command: what follows ``python`` on the command line; output: what must not be there when
    it begins anew, or None.
    """

    name: str
    command: str
    output: Path | None = None

    def describe(self) -> dict[str, Any]:
        """All that the step was told but secrets, as JSON values by name: one told the same need not run again."""
        return {"command": self.command}

    def begin(self) -> str:
        """Make room for the output; returns the command to run."""
        if self.output is not None:
            remove(self.output)
        return self.command

    def go_on(self) -> str | None:
        """As ``begin``, but after an interruption; None if nothing is left to do. Here it begins anew."""
        return self.begin()


class TrainingStep(Step):
    """A stage's command; after an interruption it goes on from its newest sound checkpoint, if it has one."""

    def go_on(self) -> str:
        return f"{self.command} --resume_from_checkpoint auto"


class StepRunner:
    """Runs steps in order, once each, however often it is made anew. A step rests on all that stand before it.

    Args:
        path: the record; beside it a lock keeps others out until all processes of this runner have ended.
        steps: all of them.
        replace: whether a step that was told something else may be done again, and all after it.

    Raises: UsageError for such a step without ``replace``, before anything runs, and if another runner is at work.
    """

    def __init__(self, path: Path, steps: Sequence[Step], replace: bool) -> None:
        self.path, record = path, read_record(path)
        touched = [*record["finished"], *filter(None, [record["begun"]])]
        for place, (name, step) in enumerate(zip(touched, steps, strict=False)):
            before = record["steps"][name] if name == step.name else {}
            if before != step.describe():
                if not replace:
                    raise UsageError(_tell_change(path, step, before))
                del touched[place:]
                break
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock(path.with_name(f".{path.name}.lock"))
        self._record = {
            "steps": record["steps"] | {step.name: step.describe() for step in steps},
            "begun": record["begun"] if record["begun"] in touched else None,
            "finished": [name for name in record["finished"] if name in touched],
        }
        self._write()

    def run(self, step: Step) -> None:
        """Run a step unless it is finished; if it fails, this process ends with the step's exit status.

        Raises: Stopped after SIGTERM, which the step gets too.
        """
        if step.name in self._record["finished"]:
            print(f"already done: {step.name}", flush=True)
            return
        command = step.go_on() if self._record["begun"] == step.name else step.begin()
        self._record["begun"] = step.name
        self._write()
        stopped = command is not None and run(command, self._lock)
        self._record["begun"] = None
        self._record["finished"].append(step.name)
        self._write()
        if stopped:
            raise Stopped(_HOW_TO_GO_ON)

    def close(self) -> None:
        """Let others in."""
        self._lock.close()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self._record, indent=2) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """What a StepRunner left: "steps", what each was told by name; "begun", a name or None; "finished", names."""
    record = {"steps": {}, "begun": None, "finished": []}
    if path.exists():
        record |= json.loads(path.read_text(encoding="utf-8"))
    # older versions wrote secrets too
    return record | {"steps": {name: without_secrets(told) for name, told in record["steps"].items()}}


def knows(path: Path, steps: Sequence[Step]) -> bool:
    """Whether the record has these very steps."""
    known = read_record(path)["steps"]
    return all(known.get(step.name) == step.describe() for step in steps)


def run(command: str, held: IO[str]) -> bool:
    """Run ``python <command>`` where the user stands; a failure has said why, so only its status is passed on.

    Args: held: a lock, which stays taken while the command, or a process that it leaves behind, lives.
    Returns: whether SIGTERM has come meanwhile, and the command was finished all the same.
    Raises: Stopped if it was not. Every SIGTERM is passed on to it.
    """
    print(f"\n$ python {command}", flush=True)
    words, inherited = [sys.executable, *shlex.split(command)], [held.fileno()]
    process = subprocess.Popen(words, env=environment(), pass_fds=inherited, preexec_fn=_end_with_parent)
    with _passing_on_sigterm(process) as received:
        status = process.wait()
    if status and received:
        raise Stopped(_HOW_TO_GO_ON)
    if status:
        sys.exit(status if status > 0 else 128 - status)  # as a shell tells a signal
    return bool(received)


@contextmanager
def _passing_on_sigterm(process: subprocess.Popen) -> Iterator[list[int]]:
    """Gives the signals that have come so far."""
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def environment() -> dict[str, str]:
    """This process's, with which ``python -m alignment...`` finds this checkout from any directory."""
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def shorten(path: Path) -> Path:
    """The path as a user would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tell_change(path: Path, step: Step, before: dict[str, Any]) -> str:
    now = step.describe()
    name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
    then, this = (f"{json.dumps(values.get(name)):.80}" for values in (before, now))
    changed = f'was begun with "{name}": {then}, which is {this} now' if before else "is new before finished ones"
    return (
        f'"output_dir": in {path.parent} step {step.name} {changed}; name another, or set "overwrite_output_dir": '
        "true to do it and all after it again"
    )


def _end_with_parent() -> None:
    """Without it a step would outlive a killed runner."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
