"""Runs by turns: two contenders in processes of their own, of which only one is awake.

Contenders need different environments, so each is a persistent process that loads once and then answers requests. It
measures the time of its own work. Between requests it is stopped by a signal: threads of OpenMP that wait for the
next task would otherwise take the cores from the one that is measured.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from alignment.runtime.faults import USAGE_STATUS, RunError, UsageError

CHECKOUT = Path(__file__).resolve().parents[1]
OWN_SETTINGS = ("MKL_DEBUG_CPU_TYPE", "MKL_NUM_THREADS", "ALIGNMENT_AUTO_THREADS", "TOKENIZERS_PARALLELISM")


class Contender:
    """A process that generates or trains on request, stopped meanwhile.

    Args:
        name: shown in tables and messages.
        module: what ``python -m`` runs; it talks as benchmarks.contenders.serving does.
        python: interpreter of its environment.
        arguments: given to the module.
        plain: keep this toolkit's CPU settings out of its environment.

    Attributes: hello: what it said when loaded.
    Raises: RunError if it ends before it answers, UsageError if that was for what it was given.
    """

    def __init__(self, name: str, module: str, python: str, arguments: Sequence[str] = (), plain: bool = True) -> None:
        self.name = name
        environment = {key: value for key, value in os.environ.items() if not (plain and key in OWN_SETTINGS)}
        self._log = tempfile.TemporaryFile()
        receive, send = os.pipe()
        self._process = subprocess.Popen(
            [python, "-m", module, str(send), *arguments],
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[send],
            text=True,
        )
        os.close(send)
        self._answers = os.fdopen(receive)
        try:
            self.hello = self._answer()
        except BaseException:  # also an interrupt while it loads
            self.close()
            raise

    def ask(self, do: str, **arguments: object) -> dict:
        """Wake it, have it do something, stop it again; returns its answer. Raises: RunError if it ended."""
        self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # it ended: reading its answer says so
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for end in (self._process.stdin, self._answers, self._log):
            end.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            if self._process.returncode == USAGE_STATUS:
                raise UsageError(f"{self.name}: {said[-1].removeprefix('error: ')}")
            raise RunError(f"{self.name}: ended with status {self._process.returncode}: {said[-1]}")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def alternate(
    ours: Callable[[int], dict], peer: Callable[[int], dict], pairs: int, show: Callable[[str], None] | None = None
) -> list[dict[str, dict]]:
    """``pairs`` times one run of ours, then one of the peer's: [{"ours": run, "peer": run}].

    Args: ours, peer: given the pair's number; a run is a dictionary with "seconds" and maybe "tokens".
        show: told of each pair; printed at once by default, for a pair may take minutes.
    """
    show = show or functools.partial(print, flush=True)
    done = []
    for number in range(pairs):
        pair = {"ours": ours(number), "peer": peer(number)}
        done.append(pair)
        seconds = " and ".join(f"{run['seconds']:.2f} s" for run in pair.values())
        show(f"  pair {number + 1} of {pairs}: {seconds}, {speed_ratio(pair):.2f}x")
    return done


def speed(run: dict) -> float:
    """Work a second: tokens where the run counts them, else runs."""
    return run.get("tokens", 1) / run["seconds"]


def speed_ratio(pair: dict[str, dict]) -> float:
    """How many times as fast ours was in one pair."""
    return speed(pair["ours"]) / speed(pair["peer"])


def median_ratio(pairs: Sequence[dict[str, dict]]) -> float:
    """Median of the pairs' ratios: not the ratio of medians, for what slows the machine slows both runs of a pair."""
    return statistics.median(speed_ratio(pair) for pair in pairs)


def median_speed(runs: Sequence[dict]) -> float:
    """Median work a second of some runs."""
    return statistics.median(speed(run) for run in runs)
