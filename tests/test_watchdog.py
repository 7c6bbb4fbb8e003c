"""A process of a real job that stops or dies: the job ends, and the logs say which one and who waited for it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from alignment.runtime import bootstrap
from tests.stages import ARGUMENTS, SCRIPTS, read_rows, write_project

PROCESSES, SECONDS = 3, 4
ENDLESS = ARGUMENTS["sft"] | {"max_steps": 10**6, "watchdog_timeout": SECONDS, "eval_datasets": None}

pytestmark = [
    pytest.mark.layouts,
    pytest.mark.skipif(bootstrap.has_gpu(), reason="describes the CPU: gloo"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = write_project(tmp_path_factory.mktemp("project"))
    (folder / "sft.json").write_text(json.dumps(ENDLESS))
    return folder


def disturb(project, name, signal_number, rank):
    """Send a signal to one rank in the middle of training: (exit status, each worker's log without notices)."""
    out = project / name
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(PROCESSES), "--log_dir", str(out / "log")]
    command = [sys.executable, "-u", *launcher, str(SCRIPTS["sft"]), "sft.json", "--output_dir", str(out)]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        metrics = out / "metrics.jsonl"
        while job.poll() is None and not (metrics.exists() and len(read_rows(metrics)) > 5):
            time.sleep(0.1)
        workers = {int(one.environ()["PADDLE_TRAINER_ID"]): one for one in psutil.Process(job.pid).children()}
        assert sorted(workers) == list(range(PROCESSES))
        os.kill(workers[rank].pid, signal_number)
        status = job.wait()
    assert not any(worker.is_running() for worker in workers.values())
    logs = [(out / "log" / f"workerlog.{number}").read_text().splitlines() for number in range(PROCESSES)]
    return status, [[line for line in log if line.startswith(("error", "Traceback", "Runtime"))] for log in logs]


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_process(project, rank):
    status, logs = disturb(project, f"stop{rank}", signal.SIGSTOP, rank)
    assert status == (1 if rank else 256 - signal.SIGKILL)  # the launcher returns that of the lowest rank
    assert logs[rank] == []
    others = [log for number, log in enumerate(logs) if number != rank]
    for log in others:
        assert len(log) == 1
        assert re.match(rf"error: watch-dog: rank {rank} has not answered for \d+ s", log[0])
        assert re.search(r"; rank \d, at step \d+, training, waits in a \w+ for rank", log[0])


def test_a_killed_process(project):
    status, logs = disturb(project, "kill", signal.SIGKILL, 1)
    assert status != 0
    assert logs == [[], [], []]  # nobody else pretends to know the reason
