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
from tests.stages import ARGUMENTS, SCRIPTS, read_rows, run, write_project

PROCESSES, SECONDS = 3, 4
PHASE = "(training|between steps)"
ENDLESS = ARGUMENTS["sft"] | {"max_steps": 10**6, "watchdog_timeout": SECONDS, "eval_datasets": None}
SLOW_REWARD = """
import os
import time

calls = 0


def slow_then_broken(responses):
    global calls
    calls += 1
    if os.environ["PADDLE_TRAINER_ID"] == "1":
        if calls > 1:
            raise ValueError("no reward today")
        time.sleep(8)
    return [len(text) / 4 for text in responses]
"""

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
        assert re.search(rf"; rank \d, at step \d+, {PHASE}, (waits in a \w+ for rank|has met it for a )", log[0])


def test_a_killed_process(project):
    status, logs = disturb(project, "kill", signal.SIGKILL, 1)
    assert status != 0
    assert logs == [[], [], []]  # nobody else pretends to know the reason


def test_a_slow_process_is_waited_for_and_a_failing_one_speaks_alone(project):
    """Rank 1 takes twice the watch-dog's time for its first rewards, and fails at its second."""
    (project / "slow.py").write_text(SLOW_REWARD)
    options = ("--reward_function", "slow.py:slow_then_broken", "--eval_datasets", "null")
    options += ("--evaluation_strategy", "no")
    sizes = ("--per_device_prompt_batch_size", 2, "--per_device_train_batch_size", 2, "--watchdog_timeout", SECONDS)
    status, _ = run(project, "ppo", *options, *sizes, processes=2)
    assert status == 1
    logs = [(project / "log" / f"workerlog.{rank}").read_text() for rank in range(2)]
    assert "error" not in logs[0]
    assert logs[1].startswith("error: reward function slow.py:slow_then_broken raised ValueError: no reward today")
    assert [row["step"] for row in read_rows(project / "ppo" / "metrics.jsonl")] == [1]
