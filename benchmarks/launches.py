"""Launches of the stages' own commands, each in a folder of its own, that an interrupted benchmark goes on with."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from alignment.runtime.arguments import resolve
from alignment.runtime.faults import RunError, UsageError
from alignment.runtime.files import whole
from benchmarks.paired import CHECKOUT

SCRIPTS = {
    "rm": "alignment/rm/run_reward.py",
    "ppo": "alignment/ppo/run_ppo.py",
    "offline": "alignment/ppo/run_offline.py",
}
ARGUMENTS = {"rm": "alignment.rm", "ppo": "alignment.ppo", "offline": "alignment.ppo.offline"}  # their package
PARTS = {"rm": ("",), "ppo": ("policy", "value"), "offline": ("policy", "value")}  # where checkpoints are put
GIVEN, FINISHED, LOG = "given.json", "finished.json", "log.txt"
SHOWN = 2000  # characters of the log of a launch that failed


@dataclass(frozen=True)
class Launch:
    """A stage with these arguments; its output_dir is ``folder``, which also gets the argument file and the log.

    A finished launch is not done again. One that was interrupted goes on from its newest checkpoint, if it has one.

    Args: stage: a key of SCRIPTS; keep: whether its checkpoints are wanted when it is finished.
    """

    stage: str
    folder: Path
    arguments: dict
    keep: bool = False

    @property
    def is_finished(self) -> bool:
        return (self.folder / FINISHED).exists()

    def check(self) -> None:
        """Raises UsageError if the stage refuses the arguments, or the folder holds a launch with others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, arguments = self.folder / GIVEN, self.arguments | {"output_dir": str(self.folder)}
        if file.exists() and (earlier := json.loads(file.read_text())) != arguments:
            key = next(key for key in sorted(earlier.keys() | arguments) if earlier.get(key) != arguments.get(key))
            raise UsageError(
                f'--folder: {self.folder} holds a run with "{key}": {json.dumps(earlier.get(key))}, not '
                f"{json.dumps(arguments.get(key))}; name another folder"
            )
        with whole(file) as partial:
            partial.write_text(json.dumps(arguments, indent=1) + "\n")
            resolve([str(partial)], importlib.import_module(f"{ARGUMENTS[self.stage]}.arguments").GROUPS)

    def run(self) -> float:
        """Run it to its end; returns seconds.

        Raises: RunError, with the end of the log, if it fails.
        """
        started = time.perf_counter()
        more = ["--overwrite_output_dir", "true"]
        if any((self.folder / PARTS[self.stage][0]).glob("checkpoint-*/trainer_state.json")):
            more += ["--resume_from_checkpoint", "true"]
        command = [sys.executable, "-u", str(CHECKOUT / SCRIPTS[self.stage]), str(self.folder / GIVEN), *more]
        with (self.folder / LOG).open("a") as log:
            status = _follow(command, log)
        if status:
            raise RunError(f"{self.folder}: status {status}: {(self.folder / LOG).read_text()[-SHOWN:]}")
        seconds = time.perf_counter() - started
        (self.folder / FINISHED).write_text(json.dumps({"seconds": seconds}) + "\n")
        if not self.keep:
            for part in PARTS[self.stage]:
                shutil.rmtree(self.folder / part, ignore_errors=True)  # not every run has all of them
        return seconds

    def evaluations(self) -> list[dict[str, float]]:
        """Rows of metrics.jsonl that hold an evaluation, in order."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if any(name.startswith("eval/") for name in row)]


def _follow(command: list[str], log: TextIO) -> int:
    """Run a command, writing what it says to ``log`` and its steps to the terminal; returns its status.

    It ends with this process, also where only this one is told to.
    """
    on_terminal = sys.stdout.isatty()
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            if on_terminal and line.startswith("step "):
                print(f"\r\033[K  {line.rstrip()}", end="", flush=True)
        return process.wait()
    finally:
        process.kill()
        process.wait()
        signal.signal(signal.SIGTERM, earlier)
        if on_terminal:
            print("\r\033[K", end="", flush=True)
