"""The stages' real commands, forked from a process that has Paddle loaded: a second each instead of ten.

A Warm is that process; ``start`` has it fork a command, as one process or as the ranks that the launcher would start.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
_LOOK_SECONDS = 0.005


class Job:
    """A command that runs. log: of each rank."""

    def __init__(self, pids: list[int], logs: list[Path]) -> None:
        self.pids, self.logs = pids, logs

    def signal(self, number: int) -> None:
        """Send it to all ranks that still run."""
        for pid, log in zip(self.pids, self.logs, strict=True):
            if not log.with_suffix(".status").exists():
                os.kill(pid, number)

    def is_running(self) -> bool:
        return not all(log.with_suffix(".status").exists() for log in self.logs)

    def wait(self) -> list[int]:
        """The exit statuses of all ranks; a signal that ended one is negative."""
        while self.is_running():
            time.sleep(_LOOK_SECONDS)
        return [int(log.with_suffix(".status").read_text()) for log in self.logs]

    @property
    def shown(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


class Warm:
    """Use it as a context manager; folder: for the commands' logs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0

    def __enter__(self) -> Warm:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "MKL_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()

    def start(self, folder: Path, script: Path, *words: object, processes: int = 1, **environment: str) -> Job:
        """Run ``script words`` in ``folder``."""
        self._count += 1
        logs = [self.folder / f"{self._count:03d}-{rank}.log" for rank in range(processes)]
        asked = {
            "folder": str(folder),
            "words": [str(script), *map(str, words)],
            "environments": [environment | ranked for ranked in _ranks(processes)],
            "logs": list(map(str, logs)),
        }
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Job(json.loads(self._server.stdout.readline()), logs)

    def run(self, folder: Path, script: Path, *words: object, **more: object) -> Job:
        """``start``, and wait for its end."""
        job = self.start(folder, script, *words, **more)
        job.wait()
        return job


def _ranks(processes: int) -> list[dict[str, str]]:
    """What Paddle's launcher puts into the environment of every rank; nothing for one process."""
    if processes == 1:
        return [{}]
    sockets = [socket.socket() for _ in range(processes)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    endpoints = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    shared = {
        "PADDLE_MASTER": endpoints[0], "PADDLE_GLOBAL_SIZE": str(processes), "PADDLE_LOCAL_SIZE": str(processes),
        "PADDLE_NNODES": "1", "PADDLE_TRAINERS_NUM": str(processes), "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_DISTRI_BACKEND": "gloo",
    }  # fmt: skip
    own = ("PADDLE_GLOBAL_RANK", "PADDLE_LOCAL_RANK", "PADDLE_TRAINER_ID", "PADDLE_RANK_IN_NODE")
    return [
        shared | dict.fromkeys(own, str(rank)) | {"PADDLE_CURRENT_ENDPOINT": endpoint}
        for rank, endpoint in enumerate(endpoints)
    ]


# ---- the process with Paddle loaded ---------------------------------------------------------------------------------


def serve() -> None:
    """Fork what is asked for on stdin, until that is closed; beside each log the exit status is written."""
    from alignment.apo import run_update  # noqa: F401 (to be loaded)
    from alignment.ppo import run_offline, run_ppo  # noqa: F401
    from alignment.rm import run_reward  # noqa: F401
    from alignment.sft import run_sft  # noqa: F401

    running: dict[int, Path] = {}
    print("ready", flush=True)
    while True:
        if select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            asked = json.loads(line)
            pids = [_fork(asked, *own) for own in zip(asked["environments"], asked["logs"], strict=True)]
            running |= dict(zip(pids, map(Path, asked["logs"]), strict=True))
            print(json.dumps(pids), flush=True)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = running.pop(ended[0]).with_suffix(".status")
            status.with_suffix(".partial").write_text(str(os.waitstatus_to_exitcode(ended[1])))
            status.with_suffix(".partial").replace(status)


def _fork(asked: dict, environment: dict[str, str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status: object = 1
    try:
        os.setsid()
        os.chdir(asked["folder"])
        os.environ.update(environment)
        output, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
        for number, target in ((0, nothing), (1, output), (2, output)):
            os.dup2(target, number)
        sys.argv = asked["words"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for thread in _threads_to_wait_for():
            thread.join()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def _threads_to_wait_for() -> list:
    """Those that Python waits for at its end."""
    import threading

    return [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()
